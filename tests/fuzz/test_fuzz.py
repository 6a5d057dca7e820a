"""Files and replies from anybody: whatever is in them, what reads them works, or raises the project's own error.

`LTE_FUZZ` is how many examples each target gets. `nox -s fuzz` tries more of them, drawn anew, and writes a table of
what happened; docs/tried.md has one.
"""

import contextlib
import copy
import json
import os
import shutil
import sqlite3
import struct
import tempfile
import threading
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import lte_lightning
from lte_lightning.callbacks import StagePlan, StageSchedule
from lte_lightning.cli.check import check_commands
from lte_lightning.cli.checkpoint_errors import guard_checkpoints
from lte_lightning.core.model.folder import read_lte_config
from lte_lightning.data import ClassificationData, GenerationData, GlueData, InstructData, LanguageModelData, MmluData
from lte_lightning.errors import UserError
from lte_lightning.recording.unsent import sync
from lte_lightning.report.bench import read_bench
from lte_lightning.report.collect import collect
from lte_lightning.report.page import write_report
from lte_lightning.report.tracked import collect_tracked
from lte_lightning.results import Evaluation, Place, Results, read_evaluation, read_results
from lte_lightning.store import read_run_file
from lte_lightning.sweep.command import fit_command
from lte_lightning.sweep.folder import SweepFolder
from lte_lightning.sweep.recall import recognise
from lte_lightning.sweep.search import Trials
from lte_lightning.sweep.spec import read_sweep
from lte_lightning.tasks import Classification

pytestmark = pytest.mark.timeout(3600 if "LTE_FUZZ" in os.environ else 300)
EXAMPLES = int(os.environ.get("LTE_FUZZ", "25"))
SEEN: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Writes how often each target was tried, and what happened, to the file that LTE_FUZZ_TABLE names."""
    yield
    if path := os.environ.get("LTE_FUZZ_TABLE"):
        head = ["| what | tried | accepted | refused in one line |", "|---|---|---|---|"]
        for target in dict.fromkeys(target for target, _ in SEEN):
            accepted, refused = SEEN[target, "accepted"], SEEN[target, "refused"]
            head.append(f"| {target} | {accepted + refused} | {accepted} | {refused} |")
        Path(path).write_text("\n".join(head) + "\n")


def tries(cost: int = 1) -> Callable[[Any], Any]:
    """How often a target is tried; `cost` is how much slower than the others it is."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    anew = {"derandomize": False} if "LTE_FUZZ" in os.environ else {}
    phases = [phase for phase in Phase if phase is not Phase.explain]  # which traces every line
    return settings(max_examples=max(EXAMPLES // cost, 5), suppress_health_check=quiet, phases=phases, **anew)


def attempt(target: str, read: Callable[[], Any]) -> None:
    """Reads; all but our own error, in one line that is short enough to be read, fails the test."""
    said = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except UserError as error:
            said = str(error)
    SEEN[target, "accepted" if said is None else "refused"] += 1
    if said is not None:
        assert 0 < len(said) < 1500
        assert said.count("\n") < 3


# What a careless or hostile hand may put in the place of a value
WORDS = st.text(max_size=8) | st.sampled_from(
    ["", "nan", "1e999", "../..", "é\ud800", "\x00", "__class__", "None", "-1"]
)
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.floats(),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, 1e308, -0.0]),
)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that lies within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@st.composite
def changed(draw: Any, valid: Any) -> Any:
    """A document with one to three of its values replaced, taken away or called otherwise."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            value = draw(VALUES)
            continue
        outer = value
        for key in path[:-1]:
            outer = outer[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "rename"])):
            case "replace":
                outer[path[-1]] = draw(VALUES)
            case "remove":
                del outer[path[-1]]
            case "rename" if isinstance(outer, dict):
                outer[draw(WORDS)] = outer.pop(path[-1])
    return value


@st.composite
def spoilt(draw: Any, valid: bytes) -> bytes:
    """A file that was cut, overwritten, put together from two, or written in another encoding."""
    at = draw(st.integers(0, len(valid)))
    match draw(st.sampled_from(["cut", "flip", "insert", "nothing", "other", "deep", "latin"])):
        case "cut":
            return valid[:at]
        case "flip":
            return valid[:at] + draw(st.binary(min_size=1, max_size=4)) + valid[at + 1 :]
        case "insert":
            return valid[:at] + draw(st.binary(max_size=12)) + valid[at:]
        case "nothing":
            return draw(
                st.sampled_from([b"", b"\n", b"null", b"\xef\xbb\xbf" + valid, valid.decode("latin1").encode("utf-16")])
            )
        case "other":
            return draw(st.binary(max_size=60))
        case "deep":
            return draw(st.sampled_from([b"[" * 9_000, b'{"a":' * 9_000, b"- " * 9_000, b"&a [*a]"]))
        case _:
            return valid[:at] + b"\xe9t\xe9" + valid[at:]


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def as_yaml(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, OverflowError):
        return dumped(value)


def files(valid: Any, write: Callable[[Any], bytes] = dumped) -> st.SearchStrategy[bytes]:
    """Contents of a file: of a changed document, or a spoilt one."""
    return changed(valid).map(write) | spoilt(write(valid))


@contextlib.contextmanager
def folder_with(origin: Path, **contents: bytes) -> Iterator[Path]:
    """A copy of a folder in which files are replaced: `model__config.json` is model/config.json."""
    with tempfile.TemporaryDirectory() as place:
        copy_of = Path(shutil.copytree(origin, Path(place, "copy"), copy_function=os.link))
        for name, content in contents.items():
            file = copy_of / name.replace("__", "/")
            file.unlink(missing_ok=True)
            file.write_bytes(content)
        yield copy_of


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A saved LTE model with a tokenizer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    made = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=32, **sizes))
    lte_lightning.convert(made, lte_lightning.LteConfig(expert_size=8), progress=False)
    lte_lightning.set_mode(made, "hard")
    folder = tmp_path_factory.mktemp("model") / "model"
    lte_lightning.save_pretrained(made, folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, model_max_length=32).save_pretrained(folder)
    return folder


RESULTS_GIVEN: dict[str, Any] = dict(
    task="sst2", metric="accuracy", dense=0.9, hard_before=0.7, hard=0.8, soft=0.85, sparsity=0.5, sparsity_before=0.4,
    sparsity_per_layer=[0.5], flops_per_token=10.0, dense_flops_per_token=20.0, bytes_per_token=1.0,
    dense_bytes_per_token=2.0, bound=2.0, seed=0, floor=0.5, union_sparsity={"1": 0.5}, grouping={"inertia": 1.0},
    seconds_per_stage={"dense": 1.0, "router": 1.0, "expert": 1.0}, versions={"torch": "2"}, skipped_rows={"a": 1},
    score_histogram=[[1] * 50], speedup=1.5, latency_ms=1.0, dense_latency_ms=1.5, latency_of={"rows": 2},
    others={"f1": {"hard": 0.5}},
)  # fmt: skip
RESULTS = Results(**RESULTS_GIVEN).content()
RUN = {"layout": 1, "experiment": "lte", "run_id": "ab", "tracking_uri": "sqlite:///mlflow.db", "name": "one"}
CONFIG = {
    "seed_everything": 1,
    "model": {
        "class_path": "lte_lightning.tasks.Classification",
        "init_args": {"pretrained": "MODEL", "efficiency_weight": 1.0, "lte": {"expert_size": 8}},
    },
    "data": {
        "class_path": "lte_lightning.data.GlueData",
        "init_args": {"task": "sst2", "source": "x", "batch_size": 8},
    },
    "stages": {stage: {"epochs": 1, "learning_rate": 0.1} for stage in ("dense", "router", "expert")},
    "run": {"name": "n", "experiment": "e", "latency_rows": None},
    "trainer": {"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": 3, "precision": "32-true"},
}
TEST = Evaluation(sparsity=0.5, sparsity_per_layer=[0.5], others={"accuracy": 0.5, "task": "sst2"}).content()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(model, folder / "model")
    (folder / "run.json").write_bytes(dumped(RUN))
    (folder / "results.json").write_bytes(dumped(RESULTS))
    (folder / "test.json").write_bytes(dumped(TEST))
    (folder / "config.yaml").write_bytes(as_yaml(CONFIG))
    return folder


@given(data=st.data())
@tries()
def test_lte_config(data, model):
    content = data.draw(files(json.loads((model / "lte_config.json").read_text())))
    with folder_with(model, **{"lte_config.json": content}) as folder:
        attempt("lte_config.json, its options", lambda: read_lte_config(folder))
        attempt("lte_config.json, the model loaded", lambda: lte_lightning.from_pretrained(folder))


@given(data=st.data())
@tries()
def test_config_of_hugging_face(data, model):
    content = data.draw(files(json.loads((model / "config.json").read_text())))
    with folder_with(model, **{"config.json": content}) as folder:
        attempt("config.json of a model's folder", lambda: lte_lightning.from_pretrained(folder))


@given(data=st.data(), name=st.sampled_from(["lte_routers.safetensors", "model.safetensors"]))
@tries()
def test_safetensors(data, name, model):
    whole = (model / name).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, tensors = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def joined(value: Any) -> bytes:
        text = dumped(value)
        return struct.pack("<Q", len(text)) + text + tensors

    content = data.draw(changed(header).map(joined) | spoilt(whole))
    with folder_with(model, **{name: content}) as folder:
        attempt(f"{name}, header or bytes", lambda: lte_lightning.from_pretrained(folder))


@given(content=files(RUN))
@tries()
def test_run_json(content, run):
    with folder_with(run, **{"run.json": content}) as folder:
        attempt("run.json", lambda: read_run_file(folder))


WAITING: list[dict[str, Any]] = [
    {"time": 1, "params": {"a": "1"}},
    {"time": 1, "tags": {"a": "b"}},
    {"time": 1, "metrics": {"loss": 1.0}, "step": 1},
    {"time": 1, "data": {"name": "n", "digest": "d", "source_type": "local", "source": "s", "profile": {"rows": 1}}},
    {"time": 1, "file": "config.yaml", "to": None},
    {"time": 1, "status": "FINISHED"},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[str]:
    """The address of the user's database."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


@given(content=st.sampled_from(WAITING).flatmap(lambda entry: changed(entry).map(dumped) | spoilt(dumped(entry))))
@tries()
def test_unsent(content, run, store):
    about = RUN | {"tracking_uri": store, "run_id": None, "experiment": uuid.uuid4().hex}
    with folder_with(run, **{"run.json": dumped(about), "unsent.jsonl": content + b"\n"}) as folder:
        attempt("unsent.jsonl", lambda: sync(folder))


@given(content=files(RESULTS), test=files(TEST))
@tries()
def test_results_json(content, test, run):
    with folder_with(run, **{"results.json": content, "test.json": test, "progress.json": test}) as folder:
        attempt("results.json", lambda: read_results(folder))
        attempt("test.json", lambda: read_evaluation(folder / "test.json"))
        attempt("progress.json", lambda: Place.read(folder))


@given(data=st.data())
@tries(cost=5)
def test_report(data, run):
    name = data.draw(
        st.sampled_from(["run.json", "results.json", "test.json", "config.yaml", "model__lte_config.json"])
    )
    file = run / name.replace("__", "/")
    valid = CONFIG if name == "config.yaml" else json.loads(file.read_text())
    content = data.draw(files(valid, as_yaml if name == "config.yaml" else dumped))
    with folder_with(run, **{name: content}) as folder:
        attempt(f"report of a run, {name.replace('__', '/')}", lambda: report(folder))


def report(*sources: Path, bench: tuple[Path, ...] = ()) -> None:
    with tempfile.TemporaryDirectory() as out:
        write_report(collect(sources, bench), out, "fuzzed")


BENCH = """shape,scope,phase,dtype,tokens,sparsity,backend,threads,dense_ms,ms,ratio,router_ms,bound,share_of_bound,load
llama2-7b,ffn,decode,bf16,1,0.5,cpu,2,10.0,5.0,2.0,0.1,1.9,1.05,0.5
llama2-7b,ffn,decode,bf16,1,0.9,cpu,2,10.0,1.0,10.0,0.1,9.0,1.1,0.5
"""


@given(data=st.data())
@tries()
def test_bench_csv(data, tmp_path):
    table = [line.split(",") for line in BENCH.splitlines()]
    rows = listed(data.draw(changed(table)))
    text = "\n".join(",".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows)
    content = data.draw(st.just(text.encode("utf-8", "surrogatepass")) | spoilt(BENCH.encode()))
    (tmp_path / "bench.csv").write_bytes(content)
    attempt("CSV file of lte bench", lambda: read_bench(tmp_path / "bench.csv"))


@pytest.fixture(scope="module")
def fit(model, tmp_path_factory) -> Callable[..., Any]:
    """`fit(command, checkpoint)` runs a trainer from a checkpoint; or from the beginning."""
    place = tmp_path_factory.mktemp("fit")
    rows = [{"sentence": "a good film", "label": 1}, {"sentence": "a bad film", "label": 0}] * 4
    split_files(place, ".jsonl", b"\n".join(map(dumped, rows)))
    lte_lightning.restore(lte_lightning.from_pretrained(model)).save_pretrained(place / "plain")
    data = GlueData(task="sst2", source=str(place), tokenizer=str(model), max_length=16, batch_size=4)

    def run(command: str, checkpoint: Path | None = None) -> Any:
        module = Classification(task="sst2", pretrained=str(place / "plain"), lte=lte_lightning.LteConfig(8))
        schedule = StageSchedule(*[StagePlan(epochs=1) for _ in range(3)])
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
        trainer = Trainer(accelerator="cpu", max_epochs=-1, callbacks=schedule, enable_checkpointing=False, **quiet)
        guard_checkpoints(trainer)
        getattr(trainer, command)(module, datamodule=data, **({"ckpt_path": str(checkpoint)} if checkpoint else {}))
        return trainer

    return run


@pytest.fixture(scope="module")
def last(fit, tmp_path_factory) -> Path:
    """The checkpoint of a fit that has ended."""
    file = tmp_path_factory.mktemp("last") / "last.ckpt"
    fit("fit").save_checkpoint(file)
    return file


@contextlib.contextmanager
def checkpoint_of(content: Any) -> Iterator[Path]:
    """A file of bytes, or one that torch writes of anything else."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "fuzzed.ckpt")
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        yield file


def parts(checkpoint: dict[str, Any]) -> st.SearchStrategy[Any]:
    """The checkpoint with one of its parts changed; tensors are replaced, too."""
    return st.sampled_from(list(checkpoint)).flatmap(
        lambda key: changed(checkpoint[key]).map(lambda value: checkpoint | {key: value})
    ) | changed({key: None for key in checkpoint}).map(
        lambda keys: {key: checkpoint.get(key) for key in keys} if isinstance(keys, dict) else keys
    )


@pytest.mark.filterwarnings("ignore")  # torch's and Lightning's own, of what they make of it
@pytest.mark.parametrize("command", ["test", "fit"])
@given(data=st.data())
@tries(cost=5)
def test_checkpoint(command, data, fit, last):
    valid = torch.load(last, weights_only=True)
    with checkpoint_of(data.draw(parts(valid) | spoilt(last.read_bytes()))) as file:
        attempt(f"checkpoint (.ckpt), {command}", lambda: fit(command, file))


SWEEP = {
    "about": "x", "configs": ["base.yaml"], "seeds": [0, 1], "overrides": {"data.batch_size": 8},
    "variants": {
        "LTE": {"grid": {"model.efficiency_weight": [0.1, 1.0]}}, "KLA": {"list": [{"model.lte.selector": "kla"}]},
    },
    "start": {}, "floor": {"overrides": {"stages.expert.epochs": 1}},
}  # fmt: skip
SEARCH = {
    "configs": ["base.yaml"],
    "search": {
        "trials": 3,
        "parameters": {
            "model.efficiency_weight": {"low": 0.1, "high": 2.0, "log": True},
            "model.x": {"choices": [1, "a"]},
        },
        "objectives": {"hard": "maximize", "sparsity": "maximize"},
        "seed": 1,
    },
}


@given(content=files(SWEEP, as_yaml) | files(SEARCH, as_yaml))
@tries()
def test_sweep_file(content, tmp_path):
    (tmp_path / "base.yaml").write_bytes(as_yaml(CONFIG))
    (tmp_path / "sweep.yaml").write_bytes(content)
    attempt("sweep file", lambda: [fit_command(point) for point in read_sweep(tmp_path / "sweep.yaml").points()])


POINT = {
    "name": "LTE-0.1-0", "role": "point", "variant": "LTE", "parameters": {"model.efficiency_weight": 0.1}, "seed": 0,
    "configs": ["base.yaml"], "overrides": {"data.batch_size": 8, "model.efficiency_weight": 0.1}, "start": "start-0",
    "floor": None, "identity": "ab", "status": "done", "seconds": 1.5, "run": "r",
}  # fmt: skip


@given(point=files(POINT), plan=changed([POINT]))
@tries()
def test_points_of_a_sweep(point, plan, run):
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "base.yaml").write_bytes(as_yaml(CONFIG))
        (Path(place) / "sweep.yaml").write_bytes(as_yaml(SWEEP))
        sweep, folder = read_sweep(Path(place) / "sweep.yaml"), SweepFolder(Path(place) / "folder")
        with folder.hold(sweep):
            folder.plan(sweep.points())
        about = json.loads((folder.path / "sweep.json").read_text())
        (folder.path / "sweep.json").write_bytes(dumped(about | {"plan": plan}))
        (folder.points / "LTE-0.1-0.json").write_bytes(point)
        attempt("points of a sweep", lambda: recognise(sweep, folder).points())
        attempt("report of a sweep", lambda: report(folder.path))


@pytest.fixture(scope="module")
def search(tmp_path_factory) -> Path:
    """A search's folder with three trials in Optuna's database."""
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install optuna")
    place = tmp_path_factory.mktemp("search")
    (place / "base.yaml").write_bytes(as_yaml(CONFIG))
    (place / "sweep.yaml").write_bytes(as_yaml(SEARCH))
    folder = SweepFolder(place / "folder")
    folder.points.mkdir(parents=True)
    trials = Trials(read_sweep(place / "sweep.yaml"), folder)
    for _ in range(2):
        (point,) = trials.ask()
        trials.tell(point.name, Results(**RESULTS_GIVEN))
    trials.ask()
    return place


@given(data=st.data())
@tries(cost=2)
def test_optuna_database(data, search):
    with folder_with(search) as place:
        file = place / "folder" / "optuna.db"
        content = file.read_bytes()
        file.unlink()
        if data.draw(st.booleans()):
            file.write_bytes(data.draw(spoilt(content)))
        else:
            file.write_bytes(content)
            with contextlib.closing(sqlite3.connect(file)) as database:
                names = "SELECT name FROM sqlite_master WHERE type = 'table'"
                table = data.draw(st.sampled_from(sorted(name for (name,) in database.execute(names))))
                columns = sorted(row[1] for row in database.execute(f"PRAGMA table_info({table})"))
                column = data.draw(st.sampled_from(columns))
                value = data.draw(st.none() | st.integers(-3, 300) | st.floats() | st.sampled_from(["", "x", "é"]))
                with contextlib.suppress(sqlite3.Error):  # what the database itself refuses
                    if data.draw(st.booleans()):
                        database.execute(f"DROP TABLE {table}")
                    else:
                        database.execute(f"UPDATE {table} SET {column} = ?", (value,))
                    database.commit()

        def read() -> None:
            trials = Trials(read_sweep(place / "sweep.yaml"), SweepFolder(place / "folder"), patience=0)
            trials.fits_left()
            trials.ask()
            trials.write_front(place / "front.md")

        attempt("Optuna's database", read)


@given(data=st.data())
@tries()
def test_configuration(data, model, tmp_path):
    valid = json.loads(json.dumps(CONFIG).replace("MODEL", str(model)))
    file = tmp_path / "fit.yaml"
    file.write_bytes(data.draw(files(valid, as_yaml)))

    def read() -> None:
        (found,) = check_commands([["fit", "--config", str(file)]])
        if found["error"]:
            raise UserError(found["error"].partition("\n")[0])

    attempt("configuration of a fit", read)


DATA = {
    "GlueData": (
        lambda **how: GlueData(task="sst2", **how),
        [{"sentence": "a good film", "label": 1}, {"sentence": "a bad film", "label": 0}],
    ),
    "ClassificationData": (
        ClassificationData,
        [{"text": "a film", "label": "good"}, {"text": "a bad film", "label": "bad"}],
    ),
    "GenerationData": (
        lambda **how: GenerationData(task="e2e", max_new_tokens=4, **how),
        [{"meaning_representation": "name[cat]", "human_reference": "the cat."}],
    ),
    "InstructData": (
        lambda **how: InstructData(max_new_tokens=4, **how),
        [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}],
    ),
    "LanguageModelData": (lambda **how: LanguageModelData(block_size=8, **how), [{"text": "the cat eats a fish"}]),
    "MmluData": (
        lambda **how: MmluData(shots=0, **how),
        [{"question": "who?", "choices": list("abcd"), "answer": 1, "subject": "x"}],
    ),
}


@pytest.fixture(scope="module")
def tokenizers(model, make_lm_tokenizer, tmp_path_factory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_lm_tokenizer(chat=True).save_pretrained(folder)
    return {True: folder, False: model}


def read_all(kind: str, source: str, tokenizers: dict[bool, Path]) -> None:
    """Reads, checks, tokenises and batches the rows of a folder."""
    how = {"tokenizer": str(tokenizers[kind not in ("GlueData", "ClassificationData")]), "source": source}
    if kind not in ("LanguageModelData", "MmluData"):
        how |= {"batch_size": 2, "max_length": 32}
    module = DATA[kind][0](**how)
    for stage in ("fit", "test", "predict") if kind != "MmluData" else ("test",):
        module.setup(stage)
    loaders = module.test_dataloader()
    loaders = loaders if isinstance(loaders, list) else [loaders]
    for loader in loaders if kind == "MmluData" else [*loaders, module.train_dataloader()]:
        assert all(batch["input_ids"].dtype == torch.long for batch in loader)


def split_files(folder: Path, ending: str, content: bytes) -> None:
    for split in ("train", "validation", "test", "dev"):
        (folder / f"{split}{ending}").write_bytes(content)


@pytest.mark.parametrize("kind", DATA)
def test_rows_as_they_are(kind, tokenizers, tmp_path):
    """Otherwise the next test would refuse everything for a reason that has nothing to do with what it changes."""
    split_files(tmp_path, ".jsonl", b"\n".join(list(map(dumped, DATA[kind][1] * 3))))
    read_all(kind, str(tmp_path), tokenizers)


# pandas leaves a CSV file open that it cannot parse
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("kind", DATA)
@given(data=st.data())
@tries(cost=3)
def test_rows(kind, data, tokenizers):
    rows = DATA[kind][1] * 3
    ending = data.draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".jsonl.gz"]))
    if ending.startswith(".json"):
        rows = listed(data.draw(changed(rows)))
        content = b"\n".join(map(dumped, rows))
    else:
        cells = [[json.dumps(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
        lines = listed(data.draw(changed([list(rows[0]), *cells])))
        mark = "\t" if ending == ".tsv" else ","
        texts = [mark.join(map(str, line)) if isinstance(line, list) else str(line) for line in lines]
        content = "\n".join(texts).encode("utf-8", "surrogatepass")
    content = data.draw(st.just(content) | spoilt(content))
    with tempfile.TemporaryDirectory() as place:
        split_files(Path(place), ending, content)
        attempt(f"rows of {kind}", lambda: read_all(kind, place, tokenizers))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[Any]]]:
    """A server that answers everything with what stands in a list: status and body."""
    answer: list[Any] = [200, b"{}"]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(answer[1])

        do_POST = do_GET

        def log_message(self, *words: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", answer
    httpd.shutdown()
    httpd.server_close()
    thread.join()


REPLY = {
    "experiment": {
        "experiment_id": "1", "name": "e", "artifact_location": "mlflow-artifacts:/1", "lifecycle_stage": "active",
    },
    "experiments": [{"experiment_id": "1", "name": "e"}],
    "runs": [
        {
            "info": {
                "run_id": "ab", "run_uuid": "ab", "run_name": "n", "experiment_id": "1", "status": "FINISHED",
                "start_time": 1, "end_time": 2, "artifact_uri": "mlflow-artifacts:/1/ab/artifacts",
                "lifecycle_stage": "active",
            },
            "data": {"tags": [{"key": "lte.point", "value": "p"}], "metrics": [{"key": "a", "value": 1.0}]},
        }
    ],
    "root_uri": "mlflow-artifacts:/1/ab/artifacts",
    "files": [{"path": "results.json", "is_dir": False, "file_size": 10}, {"path": "config.yaml"}],
}  # fmt: skip
REPLY["run"] = REPLY["runs"][0]


@given(content=files(REPLY), status=st.sampled_from([200, 200, 200, 204, 302, 400, 401, 404, 418]), named=st.booleans())
@tries(cost=2)
def test_mlflow_replies(content, status, named, server, monkeypatch):
    address, answer = server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    answer[:] = [status, content]
    what = {"run_ids": ["ab"]} if named else {"experiment": "e"}
    attempt("MLflow's replies to lte report", lambda: collect_tracked(address, **what))

import copy
import csv
import itertools
import math
import os
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
)

from lte_lightning import LteConfig, convert, save_pretrained, set_mode
from lte_lightning.bench import machine, main, output
from lte_lightning.bench.measure import bound, interleave, measure, timed
from lte_lightning.bench.rivals import executed_width, index_select, make_rivals, masked, with_dense_down
from lte_lightning.bench.subject import SHAPES, ForcedSelector, Subject, dense_blocks, make_subject
from lte_lightning.bench.timing_row import COLUMNS
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError
from lte_lightning.kernels.cpu import ffn as cpu_ffn
from lte_lightning.kernels.dense_mask import run_dense_mask
from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.reference import run_reference
from lte_lightning.selection import SELECTORS

CPU = torch.device("cpu")
ISSUE = (
    "shape, scope, phase, dtype, tokens, sparsity, backend, threads, dense_ms, ms, ratio, router_ms, bound, "
    "share_of_bound, load"
)
SIZES = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    tiny = {
        "tiny-llama": LlamaConfig(vocab_size=256, **SIZES),
        "tiny-roberta": RobertaConfig(vocab_size=256, max_position_embeddings=64, **SIZES),
    }
    for name, config in tiny.items():
        monkeypatch.setitem(SHAPES, name, config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the same tests everywhere
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def saved(tmp_path):
    """`saved(model, **lte)`: the folder of a converted model in hard mode."""

    def make(model, **lte):
        model = convert(model, LteConfig(**({"expert_size": 16, "grouping": "contiguous"} | lte)), progress=False)
        set_mode(model, "hard")
        return save_pretrained(model, tmp_path / "saved")

    return make


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_per_figure(tmp_path, capsys):
    path = tmp_path / "out.csv"
    arguments = "--shape tiny-llama --dtype bf16,f32,mixed --tokens 1,2x3 --sparsity 0,0.5 --threads 1 --repeats 2"
    assert main([*arguments.split(), "--csv", str(path)]) == 0
    rows = rows_of(path)
    assert list(rows[0]) == COLUMNS == ISSUE.split(", ")
    keys = {tuple(row[key] for key in ("scope", "phase", "dtype", "tokens", "sparsity", "backend")) for row in rows}
    assert keys == {
        (scope, phase, dtype, tokens, sparsity, "cpu")
        for scope in ("ffn", "model")
        for phase, tokens in (("decode", "1"), ("prefill", "6"))
        for dtype in ("bf16", "f32", "mixed")
        for sparsity in ("0.0", "0.5")
    }
    assert len(rows) == len(keys)
    for row in rows:
        number = {key: float(row[key]) for key in COLUMNS[COLUMNS.index("threads") :]}
        assert number["threads"] == 1
        assert min(number["dense_ms"], number["ms"], number["router_ms"]) > 0
        assert number["ratio"] == pytest.approx(number["dense_ms"] / number["ms"], rel=2e-3)
        assert number["share_of_bound"] == pytest.approx(number["ratio"] / number["bound"], rel=2e-3)
        assert number["load"] >= 0
    assert (tmp_path / "out.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    (core,) = machine._spread(os.sched_getaffinity(0))[:1]
    assert f"1 thread on cores {core}, load" in printed
    assert "tiny-llama ffn, decode, bf16, 1 token, 3 layers: dense" in printed
    assert f"written: {path}, {tmp_path / 'out.png'}" in printed


# torch's own compiler, when it is imported
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("backend", "tokens"), [("auto", {"2x5": "10"}), ("dense-mask", {"1": "1"})])
def test_an_encoder_and_rivals(backend, tokens, tmp_path):
    path = tmp_path / "out.csv"
    arguments = "--shape tiny-roberta --sparsity 0.5 --repeats 1 --layers 1 --clock cpu --threads 1"
    options = ["--rivals", "--dtype=f32", "--device=cpu", f"--backend={backend}", f"--tokens={','.join(tokens)}"]
    assert main([*arguments.split(), *options, "--csv", str(path)]) == 0
    rows = rows_of(path)
    assert {row["phase"] for row in rows} == {"prefill"}
    found = {(row["scope"], row["tokens"], row["backend"]) for row in rows}
    ours = "cpu" if backend == "auto" else backend
    rivals = {"index_select", "expert-views", "compiled-mask", "executed-width"}
    assert found == {
        (scope, count, name)
        for count in tokens.values()
        for scope, names in (("ffn", rivals | {ours}), ("model", {ours}))
        for name in names
    }


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_rivals_of_what_no_backend_takes(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "odd", LlamaConfig(vocab_size=256, hidden_act="quick_gelu", **SIZES))
    assert main(["--shape", "odd", "--dtype", "f32", "--sparsity", "0.5", "--repeats", "1", "--rivals"]) == 1
    assert "no sparse backend has the activation QuickGELUActivation; leave --rivals out" in capsys.readouterr().err


SEQ2SEQ = {"d_model": 32, "d_ff": 96, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
def test_both_stacks_of_an_encoder_decoder(activation, dtype, saved, tmp_path):
    config = T5Config(vocab_size=64, feed_forward_proj=activation, **SEQ2SEQ)
    path = tmp_path / "out.csv"
    arguments = f"--shape {saved(AutoModelForSeq2SeqLM.from_config(config))} --dtype {dtype} --tokens 1,2x3"
    assert main([*arguments.split(), "--sparsity", "0.5", "--repeats", "1", "--csv", str(path)]) == 0
    backend = "dense-mask" if dtype == "f16" else "cpu"  # T5 keeps one of its projections in float32 then
    assert {(row["scope"], row["phase"], row["tokens"], row["backend"]) for row in rows_of(path)} == {
        (scope, "prefill", tokens, backend) for scope in ("ffn", "model") for tokens in ("1", "6")
    }


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (RobertaConfig(vocab_size=64, max_position_embeddings=40, **SIZES), 38),
        (BertConfig(vocab_size=64, max_position_embeddings=40, **SIZES), 40),
        (GPT2Config(vocab_size=64, n_positions=40, n_embd=32, n_layer=1, n_head=4), 40),
        (OPTConfig(vocab_size=64, max_position_embeddings=40, word_embed_proj_dim=32, ffn_dim=96, **SIZES), 40),
        (LlamaConfig(vocab_size=64, max_position_embeddings=40, **SIZES), math.inf),
    ],
)
def test_no_more_tokens_than_positions(config, longest, saved):
    subject = make_subject(str(saved(AutoModel.from_config(config))), torch.float32, "auto")
    assert subject.longest == longest
    measure(subject, "model", 1, 40 if longest == math.inf else longest, [0.5], 1)
    if longest < math.inf:
        with pytest.raises(UserError, match=f"has positions for {longest} tokens, and this run needs {longest + 1}"):
            measure(subject, "model", 1, longest + 1, [0.5], 1)


def test_a_model_that_gives_its_tokens_in_one_row(saved):
    sizes = {"ffn_dim": 96, "word_embed_proj_dim": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    folder = saved(AutoModelForCausalLM.from_config(OPTConfig(vocab_size=64, hidden_size=32, **sizes)))
    for backend in ("auto", "dense-mask"):
        subject = make_subject(str(folder), torch.float32, backend)
        figures, _ = measure(subject, "model", 2, 3, [0.5], 1)
        assert [figure.tokens for figure in figures] == [6]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (AutoModelForCausalLM, LlamaConfig(vocab_size=64, **SIZES)),
        (AutoModelForSequenceClassification, RobertaConfig(vocab_size=64, **SIZES)),
        (AutoModelForSeq2SeqLM, T5Config(vocab_size=64, **SEQ2SEQ)),
    ],
)
def test_a_folder_is_measured_without_its_head_as_a_named_shape_is(kind, config, saved):
    subject = make_subject(str(saved(kind.from_config(config))), torch.float32, "auto")
    ids_BT = torch.randint(3, 64, (2, 5))
    inputs = {"input_ids": ids_BT} | ({"decoder_input_ids": ids_BT} if config.is_encoder_decoder else {})
    with torch.no_grad():
        for model in (subject.dense, subject.sparse):
            subject.force(2, 5, 0.0, torch.Generator())
            assert model(**inputs)[0].shape == (2, 5, 32)
    plain = copy.copy(subject)
    plain.dense = AutoModel.from_config(config)
    assert bound(subject, "model", "decode", 1, 0.5) == bound(plain, "model", "decode", 1, 0.5)


@pytest.mark.parametrize("selector", SELECTORS)
def test_selectors_are_timed_or_refused(selector, saved, capsys):
    """Those that compute every neuron, or every expert, have nothing to gain."""
    lte = {"selector": selector, "target_sparsity": None if selector in ("router", "none") else 0.5}
    size = 1 if selector == "teal" else 16
    folder = saved(AutoModelForCausalLM.from_config(SHAPES["tiny-llama"]), expert_size=size, **lte)
    status = main(f"--shape {folder} --dtype f32 --sparsity 0.5 --repeats 1".split())
    captured = capsys.readouterr()
    why = {
        **dict.fromkeys(("cats", "kla", "narrow", "teal"), "reads the activations of all neurons before it chooses"),
        **dict.fromkeys(("sigmamoe", "softmax"), "scales the experts' outputs, which no sparse backend does"),
        "wanda": "sets weights to 0 and runs every expert",
    }
    if selector not in why:
        assert status == 0
        assert "50%  cpu" in captured.out
        return
    assert status == 1
    assert f"selects by {selector!r}, which {why[selector]}" in captured.err
    assert "Name a model that selects by router, d2dmoe, dejavu, moefication, random, or a shape" in captured.err


def test_a_converted_folder_and_mlflow(tmp_path, monkeypatch, capsys):
    import mlflow

    model = convert(AutoModelForCausalLM.from_config(SHAPES["tiny-llama"]), LteConfig(expert_size=16), progress=False)
    set_mode(model, "hard")
    save_pretrained(model, tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    arguments = f"--shape {tmp_path / 'saved'} --dtype f32 --sparsity 0.5 --repeats 1 --scope ffn"
    assert main(f"{arguments} --csv out.csv --mlflow speed".split()) == 0
    assert main(f"{arguments} --mlflow unnamed --device cpu".split()) == 0
    for experiment, files in (("speed", {"out.csv", "out.png"}), ("unnamed", {"bench.csv", "bench.png"})):
        (run,) = mlflow.search_runs(experiment_names=[experiment], output_format="list")
        assert {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)} == files
        assert run.data.params["sparsity"] == "0.5"
        assert run.data.params["device"] == "cpu"
        assert set(run.data.params["cores"].split(",")) <= {str(cpu) for cpu in os.sched_getaffinity(0)}
    assert {path.name for path in tmp_path.glob("*.csv")} == {"out.csv"}
    assert main(f"{arguments} --layers 1".split()) == 1
    assert "--layers 1 is for named shapes" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    assert main(f"{arguments} --mlflow speed".split()) == 1
    said = capsys.readouterr()
    assert "error: MLflow at nonsense://x cannot be used" in said.err
    assert "ratio" not in said.out  # before anything is measured


def test_what_was_measured_before_an_error_is_kept(tmp_path, capsys, monkeypatch):
    short = copy.deepcopy(SHAPES["tiny-roberta"])
    short.max_position_embeddings = 8
    monkeypatch.setitem(SHAPES, "short", short)
    arguments = "--shape short --dtype f32 --sparsity 0.5 --repeats 1 --scope ffn,model --tokens 1x2,1x100 --csv"
    assert main([*arguments.split(), str(tmp_path / "out.csv")]) == 1
    assert "has positions for" in capsys.readouterr().err
    with (tmp_path / "out.csv").open() as file:
        assert [(row["scope"], row["tokens"]) for row in csv.DictReader(file)] == [
            ("ffn", "2"),
            ("ffn", "100"),
            ("model", "2"),
        ]


def test_rivals_have_the_layout_that_is_best_for_them():
    weights = ExpertWeights(torch.randn(6, 4, 8), torch.randn(6, 4, 8), "silu", torch.randn(6, 4, 8))
    x_ND, mask_NE = torch.randn(3, 8), torch.rand(3, 6) > 0.5
    taken = with_dense_down(weights)
    assert taken.down_ESD.equal(weights.down_ESD)
    assert taken.down_ESD.flatten(0, 1).T.is_contiguous()
    torch.testing.assert_close(masked(x_ND, mask_NE, taken), run_dense_mask(x_ND, mask_NE, weights))
    everything = torch.ones_like(mask_NE)
    torch.testing.assert_close(executed_width(x_ND, everything, taken), run_dense_mask(x_ND, everything, weights))


def test_the_help_names_the_shapes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("llama2-7b", "smollm2-135m", "roberta-base"):
        assert name in SHAPES
        assert name in text
    assert "without the head, so that a folder compares with a named shape" in text


def test_quartiles_lie_within_the_timings():
    assert output.quartiles([1.0, 9.0]) == (3.0, 7.0)
    assert output.quartiles([4.0]) == (4.0, 4.0)


def test_a_declared_fallback_is_named(capsys):
    subject = make_subject("tiny-llama", torch.float32, "triton")
    figures, _ = measure(subject, "ffn", 1, 1, [0.5], 1)
    assert [figure.backend for figure in figures] == ["dense-mask"]


def test_an_activation_without_kernel_is_a_fallback_too(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "odd", LlamaConfig(vocab_size=256, hidden_act="quick_gelu", **SIZES))
    figures, _ = measure(make_subject("odd", torch.float32, "auto"), "ffn", 1, 1, [0.5], 1)
    assert [figure.backend for figure in figures] == ["dense-mask"]


def test_a_missing_compiler_is_a_fallback_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cpu_ffn.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"no C\+\+ compiler found"):
            figures, _ = measure(make_subject("tiny-llama", torch.float32, "auto"), "ffn", 1, 1, [0.5], 1)
        assert set(make_rivals(CPU)) == {"index_select", "expert-views", "executed-width"}
    finally:
        cpu_ffn.library.cache_clear()
    assert [figure.backend for figure in figures] == ["cpu-views"]


def test_masks_change_on_every_call_and_skip_what_they_should():
    subject = make_subject("tiny-llama", torch.float32, "auto")
    subject.force(2, 3, 1 / 3, torch.Generator().manual_seed(0))
    (selector, *_) = (ffn.selector for ffn in subject.ffns)
    assert isinstance(selector, ForcedSelector)
    seen = [selector(torch.randn(2, 3, 32)) > 0.5 for _ in range(4)]
    assert all(mask.shape == (2, 3, 3) and (mask.sum(dim=-1) == 2).all() for mask in seen)
    assert not any(mask.equal(following) for mask, following in itertools.pairwise(seen))


def test_both_twins_compute_the_same_function():
    subject = make_subject("tiny-llama", torch.float32, "auto")
    subject.force(1, 4, 0.0, torch.Generator())
    x_BTD = torch.randn(1, 4, 32)
    for block, ffn in zip(dense_blocks(subject), subject.ffns, strict=True):
        torch.testing.assert_close(ffn(x_BTD), block(x_BTD))
    ids_BT = torch.randint(3, 200, (1, 4))
    with torch.no_grad():
        expected = subject.dense(ids_BT).last_hidden_state
        torch.testing.assert_close(subject.sparse(ids_BT).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    shared = {p.data_ptr() for p in subject.dense.parameters()} & {p.data_ptr() for p in subject.sparse.parameters()}
    assert not shared  # or the cache would serve one from what the other read


def test_bounds_are_the_published_ones():
    """The table of LLaMA-2-7B at batch 1, whose end-to-end column leaves out embedding and head as we do."""
    config = copy.deepcopy(SHAPES["llama2-7b"])
    config.num_hidden_layers = 1
    with torch.device("meta"):
        dense = AutoModel.from_config(config)
    sparse = convert(copy.deepcopy(dense), LteConfig(grouping="contiguous"), group=False)
    subject = Subject("llama2-7b", dense, sparse, len(expert_ffns(sparse)))
    for sparsity, block in ((0.25, 1.32), (0.5, 1.96), (0.65, 2.77), (0.8, 4.75)):
        assert bound(subject, "ffn", "decode", 1, sparsity) == pytest.approx(block, rel=0.01)
    attention, ffn, router = 4 * 4096**2, 3 * 4096 * 11008, 344 * 4096
    expected = (attention + ffn) / (attention + router + 0.5 * ffn)
    assert bound(subject, "model", "decode", 1, 0.5) == pytest.approx(expected)
    # four tokens of independent choice load the union, and in prefill it is the multiply-adds that count
    union = 1 - (1 - 69 / 344) ** 4
    assert bound(subject, "ffn", "decode", 4, 0.8) == pytest.approx(ffn / (router + union * ffn))
    assert bound(subject, "ffn", "prefill", 64, 0.8) == pytest.approx(ffn / (router + 69 / 344 * ffn))


def test_arms_are_interleaved_and_the_first_round_is_not_counted():
    log = []
    arms = {name: (lambda name=name: log.append(name) or [float(len(log))]) for name in "abc"}
    samples = interleave(arms, repeats=5)
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 6
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", 5)
    assert min(min(times) for times in samples.values()) > 3


def test_index_select_is_right():
    weights = ExpertWeights(torch.randn(4, 8, 12), torch.randn(4, 8, 12), "silu", torch.randn(4, 8, 12))
    x_ND, mask_NE = torch.randn(3, 12), torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    torch.testing.assert_close(index_select(x_ND, mask_NE, weights), run_reference(x_ND, mask_NE, weights))


def test_threads_are_bound_to_as_many_cores_and_let_go():
    """Those of torch's that are there already, too."""
    product = torch.randn(600, 600)
    torch.set_num_threads(2)
    product @ product
    before = {thread: os.sched_getaffinity(thread) for thread in machine._threads()}
    with machine.pinned(1) as cores:
        assert torch.get_num_threads() == len(cores) == 1
        product @ product
        assert {frozenset(os.sched_getaffinity(thread)) for thread in machine._threads()} == {frozenset(cores)}
    assert torch.get_num_threads() == 2
    assert {thread: os.sched_getaffinity(thread) for thread in machine._threads() if thread in before} == before
    with pytest.raises(RuntimeError, match="stop"), machine.pinned(1):
        raise RuntimeError("stop")
    assert {thread: os.sched_getaffinity(thread) for thread in machine._threads() if thread in before} == before


def test_where_nothing_can_be_bound(monkeypatch):
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    with machine.pinned(1) as cores:
        assert cores == []
    monkeypatch.delattr(os, "sched_setaffinity")
    with machine.pinned(1) as cores:
        assert cores == []
    assert output.named([]) == "of the system's choice"


def test_one_logical_cpu_of_each_core_comes_first(monkeypatch):
    files = {f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 4},{i % 4 + 4}" for i in range(8)}
    monkeypatch.setattr(machine.Path, "exists", lambda self: str(self) in files)
    monkeypatch.setattr(machine.Path, "read_text", lambda self: files[str(self)])
    assert machine._spread({1, 2, 5, 6, 7, 0}) == [0, 1, 2, 7, 5, 6]


def test_a_gpu_is_waited_for_before_and_after_a_call(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(str(device)))
    calls = [lambda: log.append("call")]
    assert timed(calls, machine.clock_on(torch.device("cuda:1"), lambda: float(len(log)))) == [2000.0]
    assert log == ["cuda:1", "call", "cuda:1"]
    log.clear()
    assert timed(calls, machine.clock_on(CPU, lambda: float(len(log)))) == [1000.0]


def test_devices(monkeypatch):
    assert machine.find_device("auto") == machine.find_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.find_device("auto") == torch.device("cuda")
    assert machine.find_device("cuda:1") == torch.device("cuda:1")


def test_all_tensors_are_where_the_subject_is(monkeypatch):
    """On the meta device, which keeps no values: whatever was left on the CPU could not be computed with."""
    monkeypatch.setattr("lte_lightning.bench.measure.clock_on", lambda device, clock: clock)
    subject = make_subject("tiny-llama", torch.float32, "auto", device=torch.device("meta"))
    for scope in ("ffn", "model"):
        figures, _ = measure(subject, scope, 2, 3, [0.5], 1)
        assert [figure.backend for figure in figures] == ["dense-mask"]


def test_a_busy_machine_is_said_to_be(monkeypatch, capsys):
    for load, warned in ((0.0, False), (100.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, load, load))
        output.say_where(CPU, [0, 2])
        captured = capsys.readouterr()
        assert f"on cores 0,2, load {load:.2f}" in captured.out
        assert ("this machine is busy" in captured.err) == warned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape llama3", "unknown shape 'llama3'; there are llama2-7b, smollm2-135m, roberta-base"),
        ("--shape .", "is not a saved LTE model"),
        ("--dtype fp8", "unknown dtype 'fp8'; there are f32, bf16, f16, mixed"),
        ("--scope layer", "unknown scope 'layer'; there are ffn, model"),
        ("--backend cuda", "unknown backend 'cuda'; there are auto, dense-mask"),
        ("--sparsity 50", "--sparsity is '50'; it takes shares from 0 to 1"),
        ("--sparsity half", "--sparsity is 'half'"),
        ("--tokens 0", "--tokens is '0'; it takes a number like 4, or SEQUENCESxTOKENS like 32x128"),
        ("--tokens 2x3x4", "--tokens is '2x3x4'"),
        ("--clock sun", "unknown clock 'sun'; there are wall, cpu"),
        ("--clock cpu --threads 2", "--clock cpu times a single CPU thread; add --threads 1 --device cpu"),
        ("--device gpu", "unknown device 'gpu'; there are auto, cpu, cuda"),
        ("--device cuda:99", "--device is cuda:99, and torch sees"),
        ("--threads 0", "--threads is 0; it must be at least 1"),
        ("--csv nowhere/out.csv", "there is no folder nowhere to write out.csv to"),
        ("--csv tests", "tests is a folder; name the file to write"),
        ("--csv speed.png", "--csv is speed.png, which is the name of a picture; use --picture"),
        ("--tokens ²", "--tokens is '²'"),
        ("--picture speed.foo", "--picture is speed.foo; its name must end in .png, .svg, .pdf"),
        ("--shape /no/such/folder", "unknown shape '/no/such/folder'; there are llama2-7b"),
        ("--shape some/model", "some/model is not a saved LTE model"),
    ],
)
def test_bad_input(arguments, message, capsys, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    assert main(["--shape", "tiny-llama", *arguments.split()]) == 1
    assert message in capsys.readouterr().err


def test_the_picture_has_the_figures(tmp_path, monkeypatch):
    from lte_lightning.bench import picture

    figures, _ = measure(make_subject("tiny-llama", torch.float32, "auto"), "ffn", 1, 1, [0.0, 0.5], 1)
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: drawn.append(self))
    picture.draw(figures, tmp_path / "x.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["cpu"].get_ydata()) == [figure.ratio for figure in figures]
    assert list(lines["bound"].get_ydata()) == [figure.bound for figure in figures]
    assert math.isclose(lines["cpu"].get_xdata()[1], 0.5)
    picture.draw([replace(figure, tokens=count) for figure in figures for count in range(1, 7)], tmp_path / "x.png")
    assert len(drawn[1].axes) == 6
    assert len({axes.get_position().y0 for axes in drawn[1].axes}) == 2  # in two rows

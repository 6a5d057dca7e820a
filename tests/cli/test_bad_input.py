"""What bad input gets: an exit code, one message that says what to do, and nothing half-written."""

import json
import re
import shlex
import shutil
import signal

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file
from transformers import AlbertConfig, AlbertModel

from lte_lightning.recording.recorder import Recorder


@pytest.fixture
def refused(lightning, tmp_path):
    """Run a command that must fail with a message; returns its outcome."""

    def run(config, message, *args, command="fit", code=1):
        outcome = lightning(tmp_path, config, command, *args)
        assert outcome.code == code if code else outcome.code in (1, 2)
        assert re.search(message, " ".join(outcome.err.split())), outcome.err
        assert outcome.err.count("error: ") == 1
        assert "Traceback" not in outcome.err
        left = {path.name for path in tmp_path.rglob("*")}
        assert not left & {"results.json", "test.json", "model", "predictions.jsonl"}
        assert not {name for name in left if name.endswith(".tmp") or name.startswith(".probe")}
        return outcome

    return run


@pytest.mark.parametrize(
    ("option", "value", "message", "code"),
    [
        ("data.init_args.task", "sst3", r"unknown GLUE task 'sst3' \(do you mean 'sst2'\?\)", 1),
        ("model.init_args.separability_wieght", 1.0, "separability_wieght", 2),
        ("data.class_path", "lte_lightning.data.GlooData", "GlooData", 2),
        ("stages.rooter", {"epochs": 1}, "rooter", 2),
        ("trainer.max_epoch", 3, "max_epoch", 2),
        ("data.init_args.source", "./nowhere", "no folder or file nowhere|nowhere has no split", 1),
        (
            "model.init_args.lte.expert_size",
            7,
            r"expert_size=7 does not split 64 .*Divisors of 64, nearest first: 8, 4, 2, 1, 16, 32",
            1,
        ),
        ("model.init_args.lte.expert_size", 0, "expert_size is 0", 1),
        ("model.init_args.lte.threshold", 0.0, r"threshold is 0.0; it must lie in \(0, 1\)", 1),
        ("model.init_args.lte.threshold", 1.0, r"threshold is 1.0; it must lie in \(0, 1\)", 1),
        ("model.init_args.efficiency_weight", -1.0, "efficiency_weight is -1.0", 1),
        ("model.init_args.balance_weight", -1.0, "balance_weight is -1.0", 1),
        (
            "model.init_args.lte",
            {"expert_size": 8, "selector": "softmax", "target_sparsity": 0.95},
            "target_sparsity 0.95 leaves none of 8 experts running, and selector 'softmax' would have nothing to learn",
            1,
        ),
        ("model.init_args.separability_start", 2.0, "0 <= start <= end <= 1", 1),
        ("model.init_args.pretrained", "./nowhere", "no tokenizer folder ./nowhere", 1),
        ("model.init_args.init_from", "./nowhere", "cannot load the model './nowhere'", 1),
        ("stages.dense.epochs", -1, "cannot last epochs=-1", 1),
        ("stages.dense.learning_rate", -0.01, "learning_rate is -0.01; it must be 0 or more, and finite", 1),
        ("stages.dense.schedule", "cosine", "unknown schedule 'cosine'; there are linear and constant", 1),
        ("stages.expert.final", -0.1, "final is -0.1; it is a share of the peak rates, 0 <= final <= 1", 1),
        ("run.floor_from", "none.json", "none.json gives no floor", 1),
    ],
)
def test_options(option, value, message, code, tiny, refused):
    config = tiny.config(**{option: value})
    refused(config, message, code=code)


def test_no_stage_is_left(tiny, refused):
    refused(tiny.config(epochs=(0, 0, 0)), "all three stages are skipped")


def test_unknown_model_family(tiny, refused, tmp_path):
    folder = shutil.copytree(tiny.model, tmp_path / "albert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    AlbertModel(AlbertConfig(vocab_size=64, embedding_size=32, **sizes)).save_pretrained(folder)
    config = tiny.config(**{"model.init_args.pretrained": str(folder)})
    refused(config, "model type 'albert' is not supported; known are bart, bert.*row of FAMILIES")


ROWS = [{"sentence": "a film", "label": i % 2} for i in range(4)]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"validation": ROWS}, r"no split 'train'.*train\.jsonl"),
        ({"train": ROWS}, r"no split 'validation'"),
        ({"train": [], "validation": ROWS}, r"train\.jsonl is empty"),
        ({"train": [{"text": "a", "label": 1}], "validation": ROWS}, "no column 'sentence'; it has text, label"),
        ({"train": [{"sentence": "a"}], "validation": ROWS}, "no column 'label'; it has sentence"),
        (
            {"train": [*ROWS, {"sentence": "a", "label": 2}], "validation": ROWS},
            "row 4 .*label is 2, not one of 0 to 1",
        ),
        ({"train": ROWS[1::2], "validation": ROWS}, r"one label only: \[1\]"),
    ],
)
def test_files(splits, message, tiny, refused, tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(tiny.config(**{"data.init_args.source": str(folder)}), message)


def test_a_loss_that_is_not_finite_ends_the_fit_and_spares_the_checkpoint(tiny, refused, lightning, tmp_path):
    config = tiny.config(**{"stages.router.learning_rate": 1e30})
    failed = refused(config, r"the training loss is (nan|inf) in stage 'router' at step 9")
    last = failed.run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["lte"]["stage"] == "dense"
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    advice = ("--ckpt_path", last, "--stages.router.learning_rate", 1e-3)
    resumed = lightning(tmp_path, None, "fit", "--config", failed.run / "config.yaml", *advice)
    assert resumed.code == 0, resumed.err
    assert resumed.results["hard"] >= 0


def test_weights_that_make_the_loss_nan(tiny, refused, tmp_path):
    folder = shutil.copytree(tiny.model, tmp_path / "poisoned")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.intermediate.dense.weight"][3] = 3e38  # finite, and what they make of anything is not
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = tiny.config(**{"model.init_args.pretrained": str(folder)})
    refused(config, "the validation loss is nan in stage 'dense' at step 0")


def test_another_layout_version(fitted, tiny, refused, tmp_path):
    folder = shutil.copytree(fitted.run / "model", tmp_path / "newer")
    description = json.loads((folder / "lte_config.json").read_text())
    (folder / "lte_config.json").write_text(json.dumps(description | {"layout_version": 99}))
    for command in ("fit", "test"):
        refused(tiny.config(), "has layout version 99, .* reads 1", "--model.init_from", folder, command=command)


def test_test_of_a_model_that_was_never_routed(tiny, refused):
    refused(tiny.config(), "never trained with routers", command="test")


@pytest.mark.parametrize("logger", [True, False])
def test_a_run_folder_that_cannot_be_written(logger, tiny, refused, tmp_path):
    (tmp_path / "file").touch()
    config = tiny.config(**{"run.root": "file/runs", "trainer.logger": logger})
    refused(config, r"cannot write runs to .*file/runs.*run\.root")
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    "why", ["data", pytest.param("device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"))]
)
def test_a_run_that_was_refused_is_no_run_of_mlflow(why, fitted, tiny, refused, tmp_path):
    shutil.copy(fitted.cwd / "mlflow.db", tmp_path)
    config = tiny.config(**{"trainer.logger": True, "run.experiment": "refused"})
    if why == "data":
        (tmp_path / "empty").mkdir()
        refused(config, "empty", "--data.source", "empty")
    else:
        refused(config, "gpu|GPU|CUDA", "--trainer.accelerator", "gpu", code=None)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("refused")
    assert not client.search_runs([experiment.experiment_id])


def test_a_checkpoint_that_is_not_there(tiny, refused):
    refused(tiny.config(), "none.ckpt is missing", "--ckpt_path", "none.ckpt")


def test_a_checkpoint_that_is_none(tiny, refused, tmp_path):
    (tmp_path / "empty.ckpt").touch()
    refused(tiny.config(), "empty.ckpt is damaged", "--ckpt_path", "empty.ckpt")
    refused(tiny.config(), "is a folder; --ckpt_path needs a checkpoint", "--ckpt_path", tmp_path)
    foreign = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 0, "loops": {}}
    torch.save(foreign, tmp_path / "foreign.ckpt")
    refused(tiny.config(), "not written by lte-lightning", "--ckpt_path", "foreign.ckpt")


def test_weights_that_were_cut_short(fitted, tiny, refused, tmp_path):
    cut = shutil.copytree(fitted.run / "model", tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(tiny.config(), "/cut cannot be loaded: .*header", "--model.init_from", cut)


NAN = float("nan")
FFN = "bert.encoder.layer.0.intermediate.dense.weight"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("lte_routers.safetensors", lambda t: t[FFN].fill_(NAN), rf"lte_routers.safetensors holds NaN .*: {FFN}"),
        ("model.safetensors", lambda t: t[FFN].fill_(NAN), rf"damaged holds NaN or infinite values: {FFN}"),
        ("model.safetensors", lambda t: t.pop(FFN), rf"damaged lacks weights of a BertFor\w+: {FFN}"),
        ("model.safetensors", lambda t: t[FFN].add_(1.0), r"the weights' file is not what was saved with its routers"),
    ],
    ids=["nan-routers", "nan-weights", "missing", "another-model"],
)
def test_a_damaged_model_of_a_run(fitted, tiny, refused, tmp_path, file, change, message):
    damaged = shutil.copytree(fitted.run / "model", tmp_path / "damaged")
    tensors = load_file(damaged / file)
    change(tensors)
    save_file(tensors, damaged / file, {"format": "pt"})
    refused(tiny.config(), message, "--model.init_from", damaged, command="test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FFN.removeprefix("bert.")), rf"lacks weights of a BertFor\w+: {FFN}"),
        (
            lambda t: t["embeddings.word_embeddings.weight"].fill_(NAN),
            r"NaN or infinite values: bert\.embeddings",
        ),
        (lambda t: t.update({"encoder.layer.9.output.dense.bias": torch.ones(2)}), r"not take: encoder\.layer\.9"),
    ],
    ids=["missing", "nan", "more-layers"],
)
def test_a_damaged_plain_model(tiny, refused, tmp_path, change, message):
    damaged = shutil.copytree(tiny.model, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    change(tensors)
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    refused(tiny.config(), message, "--model.init_from", damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, key: state.pop(key), r"the checkpoint lacks weights: net\.bert"),
        (lambda state, key: state.update({"net.more": torch.ones(1)}), r"that the model does not take: net\.more"),
        (lambda state, key: state[key].fill_(NAN), r"the checkpoint holds NaN or infinite values: net\.bert"),
    ],
    ids=["missing", "more", "nan"],
)
def test_a_damaged_checkpoint(fitted, tiny, refused, tmp_path, change, message):
    (path,) = (fitted.run / "checkpoints").glob("best*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["state_dict"], next(key for key in checkpoint["state_dict"] if "selector" in key))
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    refused(tiny.config(), message, "--ckpt_path", tmp_path / "damaged.ckpt", command="test")


def test_a_model_that_has_passed_the_first_stage(fitted, tiny, refused):
    message = r"in stage 'expert' already, .* begin with 'dense'; set stages\.dense\.epochs to 0"
    refused(tiny.config(), message, "--model.init_from", fitted.run / "model")


@pytest.fixture
def interrupt_handler():
    """Lightning ignores further interrupts after the first."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def test_a_terminated_fit_exits_as_such_and_can_be_resumed(tiny, lightning, break_at, tmp_path):
    break_at(12, SIGTERMException())
    stopped = lightning(tmp_path, tiny.config(), "fit")
    assert stopped.code == 143
    assert "resume with" in stopped.err


def test_no_batch_to_train_on(tiny, refused):
    refused(tiny.config(**{"trainer.limit_train_batches": 0}), "limit_train_batches 0 leaves none of the 8 training")


@pytest.mark.usefixtures("interrupt_handler")
def test_ctrl_c_keeps_the_last_checkpoint_and_says_how_to_resume(tiny, lightning, break_at, tmp_path):
    break_at(12, KeyboardInterrupt())
    stopped = lightning(tmp_path, tiny.config(), "fit")
    assert stopped.code == 1
    assert "Traceback" not in stopped.err
    assert not (stopped.run / "results.json").exists()
    assert not (stopped.run / "model").exists()
    (command,) = re.findall(r"resume with\s+lightning (fit .*)", stopped.err)
    words = shlex.split(command)
    assert words == [
        "fit",
        "--config",
        f"{stopped.run}/config.yaml",
        "--ckpt_path",
        f"{stopped.run}/checkpoints/last.ckpt",
    ]
    break_at(-1, KeyboardInterrupt())
    resumed = lightning(tmp_path, None, *words)
    assert resumed.code == 0, resumed.err
    assert resumed.written == stopped.run / "results.json"


def test_ctrl_c_before_there_is_a_fit(tiny, lightning, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "make_logger", interrupt)
    stopped = lightning(tmp_path, tiny.config(**{"trainer.logger": None}), "fit")
    assert stopped.code == 130
    assert "Interrupted." in stopped.err
    assert "Traceback" not in stopped.err

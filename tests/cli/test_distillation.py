"""Learning from a dense teacher's logits, from the command line."""

import pytest
import torch

EPOCHS = (1, 1, 1)
HALF = {"model.init_args.distillation": 0.5}


def checkpoint(outcome):
    return torch.load(outcome.run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def distilled(tiny, lightning, tmp_path_factory):
    outcome = lightning(tmp_path_factory.mktemp("distilled"), tiny.config(epochs=EPOCHS, **HALF), "fit")
    assert outcome.code == 0, outcome.err
    return outcome


def test_the_model_is_another_one_than_without(distilled, tiny, lightning, tmp_path):
    plain = lightning(tmp_path, tiny.config(epochs=EPOCHS), "fit")
    mine, theirs = checkpoint(distilled)["state_dict"], checkpoint(plain)["state_dict"]
    assert mine.keys() == theirs.keys()  # the teacher is no part of the model
    assert any(not torch.equal(mine[name], theirs[name]) for name in mine)
    assert "teacher" not in checkpoint(plain)["lte"]


def test_a_resumed_fit_ends_in_the_same_weights(distilled, tiny, lightning, tmp_path, break_at):
    break_at(19, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        lightning(tmp_path, tiny.config(epochs=EPOCHS, **HALF), "fit")
    break_at(-1, RuntimeError())
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    resumed = lightning(tmp_path, tiny.config(epochs=EPOCHS, **HALF), "fit", "--ckpt_path", last)
    assert resumed.code == 0, resumed.err
    mine, theirs = checkpoint(resumed)["state_dict"], checkpoint(distilled)["state_dict"]
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_the_dense_start_teaches_the_same_from_its_folder(tiny, lightning, tmp_path):
    folders = [tmp_path / name for name in ("dense", "itself", "named")]
    for folder in folders:
        folder.mkdir()
    dense = lightning(folders[0], tiny.config(epochs=(1, 0, 0)), "fit")
    start = HALF | {"model.init_args.init_from": str(dense.run / "model")}
    itself = lightning(folders[1], tiny.config(epochs=(0, 1, 1), **start), "fit")
    start |= {"model.init_args.teacher": str(dense.run / "model")}
    named = lightning(folders[2], tiny.config(epochs=(0, 1, 1), **start), "fit")
    assert itself.code == named.code == 0, named.err
    mine, theirs = checkpoint(itself)["state_dict"], checkpoint(named)["state_dict"]
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert "teacher" not in checkpoint(named)["lte"]  # it is in its folder
    assert "teacher" in checkpoint(itself)["lte"]


def test_a_sparse_model_cannot_teach_itself(distilled, tiny, lightning, tmp_path):
    start = HALF | {"model.init_args.init_from": str(distilled.run / "model")}
    fit = lightning(tmp_path, tiny.config(epochs=(0, 0, 1), **start), "fit")
    assert fit.code == 1
    assert "it cannot teach itself; name the dense model that it came from (model.teacher)" in " ".join(fit.err.split())


def test_a_teacher_of_another_vocabulary(tiny_lm, lightning, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(small).save_pretrained(tmp_path / "teacher")
    options = HALF | {"model.init_args.teacher": str(tmp_path / "teacher")}
    fit = lightning(tmp_path, tiny_lm.config(epochs=(0, 1, 1), **options), "fit")
    assert fit.code == 1
    assert "has vocab_size 50, and the model has" in " ".join(fit.err.split())


def test_a_decoder_learns_from_its_teacher_where_there_are_labels(tiny_lm, lightning, tmp_path):
    fit = lightning(tmp_path, tiny_lm.config(epochs=(1, 1, 1), **HALF), "fit")
    assert fit.code == 0, fit.err
    assert fit.results["hard"] > 1.0

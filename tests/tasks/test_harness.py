import builtins
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import lte_lightning
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.errors import UserError
from lte_lightning.tasks.harness import evaluate


@pytest.fixture
def model(make_lm_tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=len(make_lm_tokenizer()), max_position_embeddings=256, **sizes)
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


class Spy(TorchDispatchMode):
    """Counts calls of the cpu backend's operator."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is torch.ops.lte_lightning.cpu_ffn.default
        return function(*args, **(kwargs or {}))


@pytest.fixture
def figures(make_lm_tokenizer, harness_task):
    """`figures(model)`: what the harness finds on six questions; the Brier score tells likelihoods apart."""
    pytest.importorskip("lm_eval", reason='needs the extra "harness": pip install "lte-lightning[harness]"')
    # without the harness's own thousands of tasks, whose files it would read first
    tasks = pytest.importorskip("lm_eval.tasks")
    rows = [{"question": f"{text} eats", "choices": [" a cat", " a fish", " the dog"], "answer": i % 3} for i, text in
            enumerate(["the cat", "the dog", "the owl", "a fish", "a bird", "the cow"])]  # fmt: skip
    task = harness_task(rows, "acc", "acc_norm", "brier_score")
    tokenizer = make_lm_tokenizer(pad_token="<unk>")
    options = {"bootstrap_iters": 10, "task_manager": tasks.TaskManager(include_defaults=False)}

    def figures(tested, **kwargs):
        found = evaluate(tested, tokenizer, [copy.deepcopy(task)], **options, **kwargs)["meals"]
        return {key: value for key, value in found.items() if isinstance(value, float)}

    return figures


# What the harness and its own dependencies warn of.
@pytest.mark.filterwarnings("ignore")
def test_with_all_experts_on_the_harness_finds_what_the_original_model_gives(model, figures):
    original = figures(model)
    assert {"acc,none", "acc_norm,none", "brier_score,none"} <= set(original)
    converted = lte_lightning.convert(copy.deepcopy(model), lte_lightning.LteConfig(expert_size=8))
    for mode in ("dense", "hard"):
        lte_lightning.set_mode(converted, mode)
        for ffn in expert_ffns(converted).values():
            ffn.selector.bias.data.fill_(30.0)
        assert figures(converted) == pytest.approx(original)
    for ffn in expert_ffns(converted).values():
        ffn.selector.bias.data.fill_(-30.0)
    # Another model, which the harness may well find as good: it is the likelihoods that tell whether it ran this one
    with lte_lightning.RouterTrace(converted) as trace:
        figures(converted)
    assert trace.sparsity() == 1.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_with_a_real_mask_the_sparse_backend_runs_and_finds_what_dense_mask_does(batch_size, model, figures, tmp_path):
    converted = lte_lightning.convert(model, lte_lightning.LteConfig(expert_size=8))
    with torch.no_grad():
        for parameter in converted.parameters():  # or FFNs would hardly change a likelihood
            parameter.mul_(4.0)
        for parameter in selector_parameters(converted):
            parameter.normal_()
    lte_lightning.set_mode(converted, "hard")
    lte_lightning.save_pretrained(converted, tmp_path / "saved")
    found, calls = {}, {}
    for backend in ("dense-mask", "auto"):
        loaded = lte_lightning.from_pretrained(tmp_path / "saved", backend=backend)
        with Spy() as spy:
            found[backend] = figures(loaded, batch_size=batch_size)
        calls[backend] = spy.calls
    assert calls["dense-mask"] == 0
    assert calls["auto"] > 0
    assert calls["auto"] % len(expert_ffns(loaded)) == 0
    assert found["auto"] == pytest.approx(found["dense-mask"], rel=1e-5)
    with lte_lightning.RouterTrace(loaded) as trace:
        figures(loaded)
    assert 0.3 < trace.sparsity() < 0.7
    # and the mask matters: all experts give other likelihoods
    lte_lightning.set_mode(loaded, "dense")
    assert figures(loaded)["brier_score,none"] != pytest.approx(found["auto"]["brier_score,none"], rel=1e-3)


def test_without_the_harness_it_says_what_to_install(model, make_lm_tokenizer, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError("no lm_eval")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"lte-lightning\[harness\]"):
        evaluate(model, make_lm_tokenizer(), ["arc_easy"])

import copy
import ctypes
import gc
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.activations import ACT2FN

from lte_lightning import LteConfig, convert, from_pretrained, restore, save_pretrained, set_backend, set_mode
from lte_lightning.core.model import prepared as sparse
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.storage import activation_name, expert_weights
from lte_lightning.errors import UserError
from lte_lightning.kernels import dispatch
from lte_lightning.kernels.layout import ACTIVATIONS


@pytest.fixture
def hard(build, scatter):
    """`hard(family, head)`: a routed model in hard mode and eval, about half of its experts off."""

    def make(family="bert", head="classification"):
        model = scatter(convert(build(family, head, 0.0), LteConfig(expert_size=16), progress=False))
        set_mode(model, "hard")
        return model

    return make


@pytest.fixture
def said(monkeypatch, caplog):
    """Returns what the log said since the test began."""
    monkeypatch.setattr(dispatch, "_said", set())
    caplog.set_level(logging.WARNING, "lte_lightning")
    return lambda: caplog.messages


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def storages(model):
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_same_function_same_weights(family_and_head, backend, hard, batch, said, monkeypatch):
    model = hard(*family_and_head)
    expected = logits(model, batch)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    size = sum(storages(model).values())
    set_backend(model, backend)
    ran = []
    run_experts = sparse.run_experts
    monkeypatch.setattr(sparse, "run_experts", lambda name, *rest: ran.append(name) or run_experts(name, *rest))
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    assert ran == ["cpu" if backend == "auto" else backend] * len(expert_ffns(model))
    assert said() == []
    assert sum(storages(model).values()) == size  # nothing is stored twice
    assert model.state_dict().keys() == state.keys()
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    set_backend(model, "dense-mask")
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-6, atol=1e-6)
    assert sum(storages(model).values()) == size


@pytest.mark.parametrize("undo", [restore, lambda model: set_backend(model, "dense-mask") or model])
def test_the_layout_is_undone(undo, family, build, hard, batch):
    """Torch multiplies few tokens by transposed bfloat16 weights slowly: nobody is to compare with that."""
    model = hard(family)
    before = {name: parameter.stride() for name, parameter in model.named_parameters()}
    set_backend(model)
    assert any(parameter.stride() != before[name] for name, parameter in model.named_parameters()) or family == "gpt2"
    after = {name: parameter.stride() for name, parameter in undo(model).named_parameters()}
    plain = build(family, dropout=0.0)
    wanted = before if hasattr(model, "lte_config") else {n: p.stride() for n, p in plain.named_parameters()}
    assert after == wanted


def test_the_kernels_see_the_parameters_themselves(family, hard):
    model = hard(family)
    set_backend(model)
    held = storages(model)
    for ffn in expert_ffns(model).values():
        weights = expert_weights(ffn.parts, ffn.expert_size)
        for tensor in (weights.up_ESD, weights.down_ESD, weights.gate_ESD, weights.up_bias_ES, weights.down_bias_D):
            assert tensor is None or tensor.untyped_storage().data_ptr() in held
        assert weights.down_ESD.is_contiguous()


def test_dense_mode_restore_and_saving(family, build, hard, batch, tmp_path):
    model = hard(family)
    expected = logits(model, batch)
    set_backend(model)
    save_pretrained(model, tmp_path / "saved")
    set_mode(model, "dense")
    dense = logits(restore(model), batch)
    torch.testing.assert_close(dense, logits(build(family, dropout=0.0), batch), rtol=1e-4, atol=1e-5)
    loaded = from_pretrained(tmp_path / "saved")
    assert {ffn.backend for ffn in expert_ffns(loaded).values()} == {"auto"}
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-5, atol=1e-5)


def test_moves_and_copies_keep_the_layout(family, hard, batch, said):
    model = hard(family)
    set_backend(model)
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(copied, batch), logits(model, batch))
    copied.to(torch.bfloat16)
    set_backend(model.to(torch.bfloat16), "dense-mask")
    x_BTD = torch.randn(2, 5, model.config.hidden_size, dtype=torch.bfloat16)
    with torch.no_grad():
        for mine, theirs in zip(expert_ffns(copied).values(), expert_ffns(model).values(), strict=True):
            expected = theirs(x_BTD)
            torch.testing.assert_close(mine(x_BTD), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    assert said() == []


def test_where_a_gradient_is_wanted_nothing_changes(family, hard, batch, said):
    model, other = hard(family), hard(family)
    set_backend(other)
    labels = batch["input_ids"] if model.config.is_encoder_decoder else torch.tensor([0, 1, 2])
    for net in (model, other):
        net.train()
        net(**batch, labels=labels).loss.backward()
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert said() == []  # training is the dense-mask path's; only evaluating without no_grad is worth a word
    other.eval()(**batch, labels=labels)
    assert len(said()) == 1
    assert "torch.no_grad()" in said()[0]


def test_frozen_weights_and_inputs_want_no_gradient(hard, batch, said):
    model = hard()
    model.requires_grad_(False)
    set_backend(model)
    assert not model(**batch).logits.requires_grad
    assert said() == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-biases-gqa-tied"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_the_same_tokens(family, beams, hard, tmp_path):
    model = hard(family, "lm")
    save_pretrained(model, tmp_path / "saved")
    arguments = {
        "max_new_tokens": 20,
        "min_new_tokens": 20,
        "num_beams": beams,
        "pad_token_id": 0,
        "repetition_penalty": 3.0,
    }
    ids_BT = torch.randint(3, 64, (2, 9))
    attention_mask = torch.ones_like(ids_BT)
    masked = from_pretrained(tmp_path / "saved", backend="dense-mask")
    sparse_model = from_pretrained(tmp_path / "saved")
    expected = masked.generate(ids_BT, attention_mask=attention_mask, do_sample=False, **arguments)
    actual = sparse_model.generate(ids_BT, attention_mask=attention_mask, do_sample=False, **arguments)
    assert actual.equal(expected)
    assert len(expected[:, 9:].unique()) > 2


def test_half_precision_decides_as_before(hard, batch, tmp_path):
    """Routers take the weights' type on loading, which is what they were rounded to in every call."""
    save_pretrained(hard("llama", "lm"), tmp_path / "saved")
    kwargs = {"dtype": torch.bfloat16, "backend": "dense-mask"}
    cast, wide = from_pretrained(tmp_path / "saved", **kwargs), from_pretrained(tmp_path / "saved", **kwargs)
    stored = from_pretrained(tmp_path / "saved", backend="dense-mask")
    for ffn, original in zip(expert_ffns(wide).values(), expert_ffns(stored).values(), strict=True):
        ffn.selector = original.selector
        assert ffn.selector.weight.dtype == torch.float32
    assert {ffn.selector.weight.dtype for ffn in expert_ffns(cast).values()} == {torch.bfloat16}
    assert logits(cast, batch).equal(logits(wide, batch))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", "relu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python_tanh", "gelu_tanh"),
        ("gelu_python", "gelu"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("mish", None),
        ("gelu_10", None),
        ("quick_gelu", None),
    ],
)
def test_activations_by_transformers_names(name, expected):
    if name not in ACT2FN:
        pytest.skip(f"this transformers has no {name}")
    assert activation_name(ACT2FN[name]) == expected
    if expected:
        x = torch.linspace(-6, 6, 1001)
        torch.testing.assert_close(ACTIVATIONS[expected](x), ACT2FN[name](x), rtol=1e-5, atol=2e-6)


def test_activations_that_are_functions():
    assert activation_name(nn.functional.gelu) == "gelu"
    assert activation_name(nn.GELU()) == "gelu"
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_name(torch.tanh) is None


def test_an_unknown_activation_falls_back_and_says_so_once(hard, batch, said):
    model = hard()
    for ffn in expert_ffns(model).values():
        ffn.activation = nn.Tanh()
    expected = logits(model, batch)
    set_backend(model)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-6, atol=1e-6)
    logits(model, batch)
    assert said() == [
        "backend 'auto' computes every expert and masks (dense-mask): no sparse backend has the activation Tanh"
    ]


def test_weights_of_several_types(hard, said):
    """The kernels read all of an FFN's tensors as one type; autocast does not mind."""
    model = hard("bert").bfloat16()
    set_backend(model)
    for ffn in expert_ffns(model).values():
        ffn.up.bias.data = ffn.up.bias.data.float()
        x_BTD = torch.randn(1, 2, ffn.width).bfloat16()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            actual = ffn(x_BTD)
            ffn.backend = "dense-mask"
            torch.testing.assert_close(actual, ffn(x_BTD))
    assert "weights and biases are of several types: torch.bfloat16, torch.float32" in said()[-1]


def test_other_declared_fallbacks(hard, batch, said):
    model = hard()
    expected = logits(model, batch)
    set_backend(model, "triton")
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-6, atol=1e-6)
    assert "backend 'triton' does not run on 'cpu'" in said()[-1]
    set_backend(model, "cpu")
    weight = next(iter(expert_ffns(model).values())).down.weight
    weight.data = weight.data.contiguous()
    logits(model, batch)
    assert "replaced after set_backend(); call it again" in said()[-1]
    model.double()
    logits(model, batch)
    assert "no sparse backend computes in torch.float64" in said()[-1]
    assert len(said()) == 3


def test_autocast_skips_too(family, hard, said):
    """What the dense path would give under autocast, in its type, for few tokens and for many."""
    model = hard(family)
    set_backend(model)
    for ffn in expert_ffns(model).values():
        for x_BTD in (torch.randn(2, 5, ffn.width), torch.randn(3, 70, ffn.width).bfloat16()):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                ffn.backend = "dense-mask"
                expected = ffn(x_BTD)
                ffn.backend = "auto"
                actual = ffn(x_BTD)
            # Falcon's own linear layer adds its bias in the bias's type
            assert actual.dtype == (torch.bfloat16 if family == "falcon-biases" else expected.dtype) == torch.bfloat16
            torch.testing.assert_close(
                actual.float(), expected.float(), rtol=0.02, atol=0.02 * float(expected.abs().max())
            )
    assert said() == []


def test_torch_compile_traces_autocast(hard, batch):
    model = hard()
    set_backend(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(compiled, batch), logits(model, batch))


def test_bad_input(hard, build, tmp_path):
    model = hard()
    with pytest.raises(UserError, match="unknown backend 'cuda'; there are auto, dense-mask, reference, cpu, triton"):
        set_backend(model, "cuda")
    with pytest.raises(UserError, match=r"convert\(\) it first"):
        set_backend(build())
    save_pretrained(model, tmp_path / "saved")
    with pytest.raises(UserError, match="unknown backend 'gpu'"):
        from_pretrained(tmp_path / "saved", backend="gpu")


def test_torch_compile_traces_a_model_whole(hard, batch):
    model = hard("llama", "lm")
    set_backend(model)
    expected = logits(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, batch), expected, rtol=1e-5, atol=1e-5)


def peak_of(make):
    """Peak memory of the process while `make` runs, above what it held before, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

    def status(key):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    kept = make()
    return status("VmHWM") - before, kept


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_peak_memory_is_the_dense_models(tmp_path):
    config = LlamaConfig(
        hidden_size=512, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=4, vocab_size=64
    )
    model = convert(AutoModelForCausalLM.from_config(config), LteConfig(grouping="contiguous"), progress=False)
    set_mode(model, "hard")
    save_pretrained(model, tmp_path / "saved")
    del model
    ids_BT = torch.ones(1, 4, dtype=torch.long)

    @torch.no_grad()
    def use(model):
        model(ids_BT)
        return model

    dense, _ = peak_of(lambda: use(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")))
    ours, _ = peak_of(lambda: use(from_pretrained(tmp_path / "saved")))
    assert dense > 200e6  # the measurement sees the weights
    assert ours < 1.15 * dense

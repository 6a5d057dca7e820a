"""Baselines in whole models: what an FFN gives in hard mode, and what it is charged for, by each method's formulas.

Nothing here is the package's but the modules that hold weights: which activations a method may see, how it is
calibrated, and what it computes are written out again, for a gated FFN and a plain one.
"""

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lte_lightning import LteConfig, RouterTrace, convert, set_mode
from lte_lightning.core.accounting.cost import flops_per_token
from lte_lightning.core.model.convert import selector_parameters
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.routing.calibrate import calibrate

D, F = 32, 64
MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "bert": (BertConfig, BertForSequenceClassification)}
METHODS = [
    *[(name, size) for name in ("kla", "cats", "narrow", "random") for size in (1, 8)],
    ("dejavu", 1),
    ("moefication", 8),
    ("d2dmoe", 8),
]


def build(family):
    config, model = MODELS[family]
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 2}
    return model(config(vocab_size=64, initializer_range=0.3, **sizes)).eval()


def run(model, batch):
    """What each FFN is given and gives in this mode, [N, D] of the real tokens."""
    real_BT, found = batch["attention_mask"].bool(), []
    hooks = [
        ffn.register_forward_hook(lambda ffn, given, out: found.append((given[0][real_BT], out[real_BT])))
        for ffn in expert_ffns(model).values()
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def neurons(ffn, x_ND):
    """The activations that a selection may see before it has paid for all of them, and all of them, [N, F]."""
    if ffn.gate is None:
        hidden_NF = functional.gelu(functional.linear(x_ND, ffn.up.weight, ffn.up.bias))
        return hidden_NF, hidden_NF
    gate_NF = functional.silu(x_ND @ ffn.gate.weight.T)
    return gate_NF, gate_NF * (x_ND @ ffn.up.weight.T)


def mass(neurons_NF, size):
    return torch.stack([expert.abs().sum(1) for expert in neurons_NF.split(size, dim=1)], 1)


def best_half(importance_NE):
    """The half of the experts that is most important, for each token."""
    order_NE = importance_NE.argsort(dim=1, descending=True)
    kept_NE = torch.zeros_like(importance_NE)
    for kept_E, order_E in zip(kept_NE, order_NE, strict=True):
        kept_E[order_E[: len(order_E) // 2]] = 1.0
    return kept_NE


def kept(name, ffn, x_ND, dense_ND):
    """Which experts run, [N, E], for the input ``x_ND``, which in the dense model is ``dense_ND``."""
    selector, size = ffn.selector, ffn.expert_size
    gate_NF, hidden_NF = neurons(ffn, x_ND)
    if name == "kla":
        return best_half(mass(hidden_NF, size))
    if name == "cats":  # the rows are those of the calibration, and the layers before this one are sparse
        mass_NE = mass(gate_NF, size)
        return (mass_NE > mass_NE.flatten().sort().values[mass_NE.numel() // 2 - 1]).float()
    if name == "narrow":
        mean_E = mass(neurons(ffn, dense_ND)[1], size).mean(0)
        return best_half(mean_E[None]).expand(len(x_ND), -1)
    if name == "random":
        return best_half(x_ND @ selector.weight.T)
    if name == "dejavu":
        return best_half(x_ND @ selector.first.T @ selector.second.T)
    if name == "moefication":
        direction_ND = x_ND / x_ND.norm(dim=1, keepdim=True)
        return best_half(torch.tanh(direction_ND @ selector.first.T) @ selector.second.T)
    norms_NE = (torch.relu(x_ND @ selector.first.T) @ selector.second.T).abs()
    return (norms_NE / norms_NE.max(1, keepdim=True).values >= selector.level).float()


def charged(name, size, share, gated):
    """FLOPs per token of one FFN, a share of whose neurons runs, and of its selection."""
    matrix, experts = 2 * D * F, F // size
    extra = {
        "random": 2 * D * experts,
        "dejavu": 2 * 3 * (D + experts),  # a rank of 32 / 12, rounded up
        "moefication": 2 * (D * experts + experts * experts),
        "d2dmoe": 2 * 128 * (D + experts),
    }
    whole = int(name == "cats")
    return matrix * (whole + (2 + gated - whole) * share) + extra.get(name, 0)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("name", "size"), METHODS)
def test_output_sparsity_and_flops_are_those_of_the_formulas(name, size, family):
    model = convert(build(family), LteConfig(size, "kmeans", name, 0.5), progress=False)
    with torch.no_grad():
        for parameter in selector_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)  # no bias is zero, no matrix the identity
    ids_BT = torch.randint(0, 64, (4, 12))
    batch = {"input_ids": ids_BT, "attention_mask": (torch.arange(12) < torch.tensor([[12], [9], [12], [5]])).long()}
    set_mode(model, "dense")
    dense = run(model, batch)
    calibrate(model, iter([(lambda: model(**batch), (batch["attention_mask"],))]), 1000)
    set_mode(model, "hard")
    with RouterTrace(model, batch["attention_mask"]) as trace:
        sparse = run(model, batch)

    shares = []
    with torch.no_grad():
        for ffn, (x_ND, out_ND), (dense_ND, _) in zip(expert_ffns(model).values(), sparse, dense, strict=True):
            kept_NE = kept(name, ffn, x_ND, dense_ND)
            hidden_NF = neurons(ffn, x_ND)[1] * kept_NE.repeat_interleave(size, dim=1)
            expected_ND = functional.linear(hidden_NF, ffn.down.weight, ffn.down.bias)
            torch.testing.assert_close(out_ND, expected_ND, rtol=1e-4, atol=1e-4)
            shares.append(float(kept_NE.mean()))
    assert 1 - trace.sparsity() == pytest.approx(sum(shares) / 2)
    assert sum(shares) / 2 == pytest.approx(0.5, abs=0.02)
    attention = 2 * 4 * D * D
    expected = sum(attention + charged(name, size, share, gated=family == "llama") for share in shares)
    assert flops_per_token(model, [1 - share for share in shares]) == pytest.approx(expected, abs=2)

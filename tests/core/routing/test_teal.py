"""TEAL on tiny models, against the formulas written out."""

import pytest
import torch

from lte_lightning import LteConfig, RouterTrace, convert, set_mode
from lte_lightning.core.accounting.cost import flops_per_token
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.parts import weight_rows
from lte_lightning.core.routing.calibrate import calibrate
from lte_lightning.selection.teal import STEP

FAMILIES = ["bert", "llama-biases-gqa-tied", "gpt2", "opt", "modernbert"]


def calibrated(build, family, sparsity, batch):
    """The model with its levels, and the input [N, D] that each dense FFN had of the real tokens."""
    model = convert(build(family), LteConfig(1, selector="teal", target_sparsity=sparsity), progress=False)
    real_N = batch["attention_mask"].flatten().bool()
    inputs = {}

    def keep(ffn, given):
        inputs[ffn] = given[0].flatten(0, -2)[real_N]

    hooks = [ffn.register_forward_pre_hook(keep) for ffn in expert_ffns(model).values()]
    set_mode(model, "dense")
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    calibrate(model, iter([(lambda: model(**batch), (batch["attention_mask"],))]), 1000)
    return model, inputs


def affine(projection, x_NI):
    out_NO = x_NI @ weight_rows(projection).T
    return out_NO if projection.bias is None else out_NO + projection.bias


def formula(ffn, x_ND, levels):
    """The output with a level for each matrix (gate if there is one, up, down), and each matrix's share of zeros."""
    cut = [torch.where(x_ND.abs() > level, x_ND, torch.zeros(())) for level in levels[:-1]]
    if ffn.gate is None:
        hidden_NF = ffn.activation(affine(ffn.up, cut[0]))
    else:
        hidden_NF = ffn.activation(affine(ffn.gate, cut[0])) * affine(ffn.up, cut[1])
    kept_NF = torch.where(hidden_NF.abs() > levels[-1], hidden_NF, torch.zeros(()))
    return affine(ffn.down, kept_NF), hidden_NF, [float((given == 0).float().mean()) for given in (*cut, kept_NF)]


def level(values, share):
    """The largest of the smallest `share` of all |values|."""
    ordered = sorted(abs(float(value)) for value in values.flatten())
    count = round(share * len(ordered))
    return ordered[count - 1] if count else -1.0


def greedy(ffn, x_ND, target):
    """The authors' algorithm, one matrix after the other."""
    count = 2 if ffn.gate is None else 3
    dense_ND, hidden_NF, _ = formula(ffn, x_ND, [-1.0] * count)
    tables = [x_ND] * (count - 1) + [hidden_NF]
    shares = [0.0] * count
    while target - sum(shares) / count > 1e-9:
        step = count * min(STEP, target - sum(shares) / count)
        best, chosen = float("inf"), None
        for i in range(count):
            if shares[i] >= 1.0:
                continue
            trial = shares.copy()
            trial[i] = min(1.0, trial[i] + step)
            out_ND, _, _ = formula(ffn, x_ND, [level(t, s) for t, s in zip(tables, trial, strict=True)])
            error = float((out_ND - dense_ND).norm())
            if error < best:
                best, chosen = error, trial
        shares = chosen
    return shares, [level(t, s) for t, s in zip(tables, shares, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_allocation_is_the_greedy_one(family, build, batch):
    target = 0.53  # no multiple of the step
    model, inputs = calibrated(build, family, target, batch)
    with torch.no_grad():
        for ffn, x_ND in inputs.items():
            shares, levels = greedy(ffn, x_ND, target)
            assert sum(shares) / len(shares) == pytest.approx(target)
            assert len(set(shares)) > 1, "nothing was allocated"
            found = [*ffn.selector.input_levels.tolist(), float(ffn.selector.level)]
            assert [max(each, -1.0) for each in found] == pytest.approx(levels, rel=1e-4)
    assert {ffn.mode for ffn in expert_ffns(model).values()} == {"dense"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_computed_and_counted(family, build, batch):
    model, _ = calibrated(build, family, 0.5, batch)
    real_N = batch["attention_mask"].flatten().bool()
    seen = []
    for ffn in expert_ffns(model).values():
        ffn.register_forward_hook(lambda ffn, given, out: seen.append((ffn, given[0], out)))
    set_mode(model, "hard")
    with torch.no_grad(), RouterTrace(model, batch["attention_mask"]) as trace:
        model(**batch)
    unused = []
    with torch.no_grad():
        for ffn, x_BTD, out_BTD in seen:
            levels = [*ffn.selector.input_levels.tolist(), float(ffn.selector.level)]
            expected, *_ = formula(ffn, x_BTD.flatten(0, -2), levels)
            torch.testing.assert_close(out_BTD.flatten(0, -2), expected, rtol=1e-4, atol=1e-4)
            *_, zeros = formula(ffn, x_BTD.flatten(0, -2)[real_N], levels)
            unused.append(sum(zeros) / len(zeros))
    # a level is one of the values that it cuts: by rounding one or two may fall on its other side
    assert trace.sparsity() == pytest.approx(sum(unused) / 2, abs=1e-3)
    assert 0.3 < trace.sparsity() < 0.7
    ffns = sum(ffn.flops_dense() for ffn in expert_ffns(model).values())
    saved = flops_per_token(model) - flops_per_token(model, unused)
    assert saved == pytest.approx(ffns * sum(unused) / 2, abs=2)


def test_before_calibration_and_in_the_dense_and_soft_modes_nothing_is_left_out(build, batch):
    model, _ = calibrated(build, "llama", 0.9, batch)
    fresh = convert(build("llama"), LteConfig(1, selector="teal", target_sparsity=0.9), progress=False)
    outputs = {}
    with torch.no_grad():
        for name, each, mode in (("dense", model, "dense"), ("fresh", fresh, "hard"), ("thinned", model, "hard")):
            set_mode(each, mode)
            outputs[name] = each(**batch).logits
    torch.testing.assert_close(outputs["fresh"], outputs["dense"])
    assert not outputs["thinned"].allclose(outputs["dense"], atol=1e-2)


def test_padding_changes_no_level(build, batch):
    model, _ = calibrated(build, "bert", 0.5, batch)
    ids_BT = batch["input_ids"].where(batch["attention_mask"].bool(), 7)
    other, _ = calibrated(build, "bert", 0.5, batch | {"input_ids": ids_BT})
    for ffn, same in zip(expert_ffns(model).values(), expert_ffns(other).values(), strict=True):
        torch.testing.assert_close(ffn.selector.input_levels, same.selector.input_levels)
        torch.testing.assert_close(ffn.selector.level, same.selector.level)


def test_half_precision_compares_with_the_level_itself(build):
    model = convert(build("llama"), LteConfig(1, selector="teal", target_sparsity=0.5), progress=False)
    teal = next(iter(expert_ffns(model).values())).selector
    teal.input_levels.fill_(1.001)  # in bfloat16 the next number below is 1
    x_BTD = torch.tensor([[[1.0, 1.0078125, -1.0, -1.0078125]]], dtype=torch.bfloat16)
    for given_BTD in teal.sparsify_input(x_BTD):
        assert given_BTD.dtype == torch.bfloat16
        assert given_BTD.tolist() == [[[0.0, 1.0078125, 0.0, -1.0078125]]]


def test_every_family_is_thinned_to_the_sparsity_asked_for(family, build, batch, masks):
    """On the rows of the calibration; the second layer sees what the thinned first one gives it."""
    model = convert(build(family), LteConfig(1, selector="teal", target_sparsity=0.5), progress=False)
    calibrate(model, iter([(lambda: model(**batch), masks)]), 1000)
    set_mode(model, "hard")
    with torch.no_grad(), RouterTrace(model, *masks) as trace:
        model(**batch)
    assert trace.sparsity() == pytest.approx(0.5, abs=0.02)

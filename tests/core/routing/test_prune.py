"""Wanda on tiny models, against the formulas written out."""

import pytest
import torch

from lte_lightning import LteConfig, RouterTrace, convert, restore, set_mode
from lte_lightning.core.accounting.cost import flops_per_token, token_cost
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.parts import Projection, find_layers, weight_rows
from lte_lightning.core.routing.calibrate import calibrate
from lte_lightning.core.routing.prune import hold_zeros
from lte_lightning.errors import UserError
from lte_lightning.selection import SELECTORS, FfnShape

FAMILIES = ["bert", "llama-biases-gqa-tied", "gpt2", "opt", "phi3", "modernbert"]


def wanda(sparsity=0.5, pattern="unstructured", scope="ffn"):
    return LteConfig(selector="wanda", target_sparsity=sparsity, wanda_pattern=pattern, wanda_scope=scope)


def pruned(model, batch, config):
    convert(model, config, progress=False)
    masks = tuple(value for key, value in batch.items() if key.endswith("attention_mask"))
    calibrate(model, iter([(lambda: model(**batch), masks)]), 1000)
    return model


def gone(weight_OI, norms_I, sparsity, pattern):
    """The definition, one row and one group after the other."""
    result = torch.zeros_like(weight_OI, dtype=torch.bool)
    for o, row in enumerate(weight_OI.tolist()):
        score = [abs(weight) * float(norm) for weight, norm in zip(row, norms_I, strict=True)]
        size = len(row) if pattern == "unstructured" else int(pattern.split(":")[1])
        for start in range(0, len(row), size):
            group = sorted(range(start, start + size), key=lambda i, score=score: score[i])
            for i in group[: int(sparsity * size)]:  # as the authors' code, of 16 weights 12 at 0.8
                result[o, i] = True
    return result


@pytest.mark.parametrize(
    ("sparsity", "pattern"), [(0.5, "unstructured"), (0.8, "unstructured"), (0.5, "2:4"), (0.5, "4:8")]
)
def test_the_least_important_go(sparsity, pattern):
    torch.manual_seed(0)
    weight_OI, norms_I = torch.randn(5, 16), torch.rand(16) * 3
    made = SELECTORS["wanda"].make(FfnShape(16, 1), wanda(sparsity, pattern), None)
    found = made.least_important(weight_OI, norms_I)
    assert found.equal(gone(weight_OI, norms_I, sparsity, pattern))
    assert int(found.sum()) == 5 * int(16 * sparsity)
    assert not found.equal(gone(weight_OI, torch.ones(16), sparsity, pattern)), "the inputs count for nothing"


@pytest.mark.parametrize("scope", ["ffn", "layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_pruned_by_what_the_pruned_ones_before_them_give(family, scope, build, batch):
    model = pruned(build(family), batch, wanda(0.6, scope=scope))
    naive = convert(build(family), wanda(0.6, scope=scope), progress=False)
    real_N = batch["attention_mask"].flatten().bool()
    for layer in find_layers(naive):
        inputs = {}
        (ffn,) = expert_ffns(layer).values()
        projections = [m for m in (layer if scope == "layers" else ffn).modules() if isinstance(m, Projection)]
        hooks = [
            p.register_forward_hook(lambda p, given, out, seen=inputs: seen.update({p: given[0]})) for p in projections
        ]
        with torch.no_grad():
            naive(**batch)
            for projection, x_BTI in inputs.items():
                norms_I = [float(column_N.norm()) for column_N in x_BTI.flatten(0, -2)[real_N].T]
                weight_OI = weight_rows(projection)
                weight_OI[gone(weight_OI, norms_I, 0.6, "unstructured")] = 0.0
        assert len(inputs) == len(projections)
        for hook in hooks:
            hook.remove()
    for name, value in naive.state_dict().items():
        assert model.state_dict()[name].equal(value) or name.endswith("density"), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_a_plain_one_with_zeros(family, build, batch):
    model = pruned(build(family), batch, wanda(0.5, "2:4"))
    ffns = list(expert_ffns(model).values())
    assert [float(ffn.selector.density) for ffn in ffns] == [0.5, 0.5]
    for ffn in ffns:
        for projection in (p for p in (ffn.gate, ffn.up, ffn.down) if p is not None):
            assert bool(((weight_rows(projection).unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all())
    set_mode(model, "hard")
    with torch.no_grad(), RouterTrace(model, batch["attention_mask"]) as trace:
        hard = model(**batch).logits
    assert trace.sparsity() == pytest.approx(0.5)
    with torch.no_grad():
        torch.testing.assert_close(restore(model)(**batch).logits, hard)


def test_encoder_decoders_are_pruned_by_the_tokens_of_each_stack(seq2seq_family, build, batch):
    model = pruned(build(seq2seq_family), batch, wanda())
    changed = batch | {
        f"{side}input_ids": torch.where(batch[f"{side}attention_mask"].bool(), batch[f"{side}input_ids"], 9)
        for side in ("", "decoder_")
    }
    other = pruned(build(seq2seq_family), changed, wanda())
    for name, value in model.state_dict().items():
        assert value.equal(other.state_dict()[name]), name


@pytest.mark.parametrize("scope", ["ffn", "layers"])
def test_adaptation_leaves_zeros_where_they_are(scope, build, batch, labels):
    model = pruned(build("bert"), batch, wanda(0.5, scope=scope)).train()
    set_mode(model, "hard")
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        hold_zeros(model)
        optimizer.step()
    weights = [name for name in before if "encoder.layer" in name and before[name].dim() == 2]
    zeros = {name for name in weights if bool((before[name] == 0).any())}
    assert zeros == {name for name in weights if scope == "layers" or "intermediate" in name}
    for name, value in model.named_parameters():
        if name in zeros:
            assert (value == 0).equal(before[name] == 0)
        if name in weights:
            assert not value.equal(before[name])


def test_nothing_is_held_without_wanda(build, batch, labels):
    model = convert(build("bert"), LteConfig(16, "contiguous"), progress=False)
    with torch.no_grad():
        next(iter(expert_ffns(model).values())).up.weight.zero_()
    model(**batch, labels=labels).loss.backward()
    hold_zeros(model)
    assert bool(next(iter(expert_ffns(model).values())).up.weight.grad.any())


def test_neurons_keep_the_order_that_patterns_count_in(build):
    model = convert(build("bert"), wanda(0.5, "2:4"), progress=False)
    plain = build("bert").state_dict()
    assert expert_ffns(model)["bert.encoder.layer.0.intermediate.dense"].up.weight.equal(
        plain["bert.encoder.layer.0.intermediate.dense.weight"]
    )


def test_what_is_charged(build):
    ffn, attention, llama = 3 * 32 * 96, 4 * 32 * 32, build("llama", "lm")
    model = convert(llama, wanda(0.5), progress=False)
    assert flops_per_token(model) == 2 * 2 * (ffn + attention)
    assert flops_per_token(model, [0.5, 0.5]) == 2 * 2 * (ffn // 2 + attention)
    dense, sparse = token_cost(model, context=0), token_cost(model, [0.5, 0.5], context=0)
    assert dense.parameters - sparse.parameters == ffn
    assert dense.bytes - sparse.bytes == 2 * ffn - 2 * ffn // 8  # a bit for every weight says where the others stand
    assert dense.ffn_bytes - sparse.ffn_bytes == 2 * ffn - 2 * ffn // 8

    everything = convert(restore(model), wanda(0.5, "4:8", "layers"), progress=False)
    assert flops_per_token(everything) == 2 * 2 * (ffn + attention)
    assert flops_per_token(everything, [0.5, 0.5]) == 2 * (ffn + attention)
    sparse = token_cost(everything, [0.5, 0.5], context=0)
    assert dense.parameters - sparse.parameters == ffn + attention
    assert dense.bytes - sparse.bytes == 2 * (ffn + attention) - 2 * (ffn + attention) // 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_sparsity": 0.5, "wanda_pattern": "2:4"}, "are for 'wanda', not for selector 'kla'"),
        ({"target_sparsity": 0.5, "wanda_scope": "layers"}, "are for 'wanda', not for selector 'kla'"),
        (
            {"selector": "wanda", "target_sparsity": 0.8, "wanda_pattern": "2:4"},
            "target_sparsity is 0.8; set target_sparsity to 0.5",
        ),
        ({"selector": "wanda"}, "needs the share of the weights that shall not run"),
        ({"selector": "teal", "target_sparsity": 0.5}, r"single neurons; set expert_size to 1 \(it is 32\)"),
    ],
)
def test_configurations_that_make_no_sense(given, message):
    with pytest.raises(UserError, match=message):
        LteConfig(**({"selector": "kla"} | given))


def test_rows_that_no_pattern_divides_are_refused_before_anything_changes(build):
    model = build("bert")
    layer = find_layers(model)[0]
    layer.output.dense = torch.nn.Linear(94, 32)
    layer.intermediate.dense = torch.nn.Linear(32, 94)
    convert(restore(convert(model, LteConfig(2, "contiguous"), progress=False)), LteConfig(2, "contiguous"), False)
    restore(model)
    with pytest.raises(UserError, match=r"2:4 needs rows of a multiple of 4 weights.* a projection of 94 inputs"):
        convert(model, LteConfig(2, selector="wanda", target_sparsity=0.5, wanda_pattern="2:4"), progress=False)
    assert not expert_ffns(model)


def test_all_layers_of_an_encoder_decoder_are_refused(build, seq2seq_family):
    with pytest.raises(UserError, match="has an encoder and a decoder, whose cross-attention reads both"):
        convert(build(seq2seq_family), wanda(scope="layers"), progress=False)


def test_a_projection_that_reads_no_tokens_is_refused(build, batch):
    with pytest.raises(UserError, match=r"cannot tell real tokens from padding: .* set wanda_scope to ffn"):
        pruned(build("deberta-v2"), batch, wanda(scope="layers"))


def test_no_more_batches_are_run_than_are_needed(build, batch):
    model, runs = convert(build("bert"), wanda(), progress=False), []
    given = [(lambda i=i: runs.append(i) or model(**batch), (batch["attention_mask"],)) for i in range(5)]
    calibrate(model, iter(given), int(batch["attention_mask"].sum()) + 1)
    assert runs == [0, 1, 0, 1]  # both layers by the same two

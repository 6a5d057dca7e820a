"""The knob of a trained model: thresholds found on rows, kept in the folder, turned at run time."""

import copy
import json
import logging

import pytest
import torch

import lte_lightning
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.folder import LayoutError
from lte_lightning.core.model.thresholds import THRESHOLDS_FILE, keep_table, kept_table
from lte_lightning.core.routing.knob import GRID, find_thresholds, layer_losses, share_out
from lte_lightning.errors import UserError

ROWS, LENGTH = 8, 12


def sparse(family, build, **options):
    torch.manual_seed(0)
    lte = lte_lightning.LteConfig(expert_size=4, router_margin=0.1, router_scale=2.0, grouping="contiguous", **options)
    model = lte_lightning.convert(build(family, "lm"), lte, progress=False).eval()
    lte_lightning.set_mode(model, "hard")
    return model


def batches_of(model, with_labels=True):
    torch.manual_seed(1)
    found = []
    for _ in range(3):
        ids_BT = torch.randint(3, 64, (ROWS, LENGTH))
        mask_BT = (torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (ROWS, 1))).long()
        batch = {"input_ids": ids_BT, "attention_mask": mask_BT}
        masks = (mask_BT,)
        if with_labels:
            batch["labels"] = ids_BT.masked_fill(mask_BT == 0, -100)
            masks += (mask_BT,) if model.config.is_encoder_decoder else ()
        found.append((lambda batch=batch: model(**batch), masks))
    return found


def measured(model, batches):
    active = pairs = 0
    for run, masks in batches:
        with torch.no_grad(), lte_lightning.RouterTrace(model, *masks) as trace:
            run()
        counts = trace.counts()
        active, pairs = active + int(counts.active_L.sum()), pairs + sum(counts.pairs)
    return 1 - active / pairs


@pytest.mark.parametrize("family", ["llama", "t5", "opt"])
@pytest.mark.parametrize("layers", ["free", "equal"])
def test_each_sparsity_is_reached_on_the_rows(family, layers, build):
    model = sparse(family, build)
    batches = batches_of(model)
    table = find_thresholds(model, batches, [0.9, 0.3, 0.6], layers)
    assert [setting.sparsity for setting in table.settings] == [0.3, 0.6, 0.9]
    assert {ffn.threshold for ffn in expert_ffns(model).values()} == {0.5}  # as before
    keep_table(model, table)
    for setting in table.settings:
        assert lte_lightning.set_sparsity(model, setting.sparsity) == setting.reached
        assert measured(model, batches) == pytest.approx(setting.reached, abs=1e-9)
        assert setting.reached == pytest.approx(setting.sparsity, abs=0.01)
        if layers == "equal":
            assert setting.per_layer == pytest.approx([setting.sparsity] * len(setting.per_layer), abs=0.02)
        else:
            assert len(set(setting.thresholds)) == 1


def taught(model, run):
    """Runs with the dense model's own answers as labels, so that what is left out costs."""
    (batch,) = run.__defaults__
    kinds = [ffn.mode for ffn in expert_ffns(model).values()]
    lte_lightning.set_mode(model, "dense")
    answers_BT = model(**batch).logits.argmax(-1)
    lte_lightning.set_mode(model, kinds[0])
    labels_BT = torch.cat([answers_BT[:, :1], answers_BT[:, :-1]], 1)
    return model(**batch | {"labels": labels_BT.masked_fill(batch["attention_mask"] == 0, -100)})


def test_the_least_loss_is_where_a_layer_does_nothing(build):
    model = sparse("llama", build)
    ffns = list(expert_ffns(model).values())
    with torch.no_grad():
        ffns[1].down.weight.zero_()
        ffns[0].down.weight.mul_(5)
    batches = [(lambda run=run: taught(model, run), masks) for run, masks in batches_of(model)]
    table = find_thresholds(model, batches, [0.45], "least-loss")
    assert table.settings[0].per_layer[1] > 0.85 > 0.1 > table.settings[0].per_layer[0]
    losses = {}
    for layers in ("least-loss", "equal"):
        keep_table(model, find_thresholds(model, batches, [0.45], layers))
        lte_lightning.set_sparsity(model, 0.45)
        with torch.no_grad():
            losses[layers] = sum(float(run().loss) for run, _ in batches)
    lte_lightning.set_sparsity(model, None)
    assert losses["least-loss"] < losses["equal"]


def test_losses_of_one_layer_leave_the_others_alone(build):
    model = sparse("llama", build)
    batches = batches_of(model)
    with torch.no_grad():
        losses_LG, pairs = layer_losses(model, batches)
    assert losses_LG.shape == (2, len(GRID))
    assert pairs[0] == pairs[1]
    assert {ffn.threshold for ffn in expert_ffns(model).values()} == {0.5}


def test_a_budget_is_shared_out_by_slopes():
    grid = torch.tensor(GRID, dtype=torch.float64)
    cheap, dear = 0.1 * grid, 10 * grid**2
    assert share_out(torch.stack([cheap, dear]), [1, 1], 0.3) == pytest.approx([0.6, 0.0])
    shares = share_out(torch.stack([cheap, dear]), [1, 1], 0.6)
    assert shares == pytest.approx([0.97, 0.23])
    assert share_out(torch.stack([cheap, dear]), [3, 1], 0.75) == pytest.approx([0.97, 0.09])  # sizes count
    bumpy = cheap + torch.tensor([0.0, 0.05, 0, 0, 0.05, 0, 0, 0])
    assert sum(share_out(torch.stack([bumpy, cheap]), [1, 1], 0.5)) == pytest.approx(1.0)
    with pytest.raises(UserError, match=r"reaches sparsities up to 0\.97, not 0\.98"):
        share_out(torch.stack([cheap, dear]), [1, 1], 0.98)


def test_rows_without_a_loss(build):
    model = sparse("llama", build)
    with pytest.raises(UserError, match="least-loss needs a loss"):
        find_thresholds(model, batches_of(model, with_labels=False), [0.5], "least-loss")
    find_thresholds(model, batches_of(model, with_labels=False), [0.5], "free")


@pytest.mark.parametrize("wrong", [[], [0.0], [1.0], [float("nan")], [0.5, 1.2]])
def test_sparsities_that_are_none(wrong, build):
    model = sparse("llama", build)
    with pytest.raises(UserError, match="must be above 0 and below 1"):
        find_thresholds(model, batches_of(model), wrong)


def test_a_selector_without_a_threshold(build):
    model = sparse("llama", build, selector="kla", target_sparsity=0.5)
    with pytest.raises(UserError, match="selector 'kla' chooses without a threshold"):
        find_thresholds(model, batches_of(model), [0.5])


# The table


@pytest.fixture
def knobbed(build):
    model = sparse("llama", build)
    keep_table(model, find_thresholds(model, batches_of(model), [0.3, 0.6, 0.8]))
    return model


def test_between_two_entries_is_interpolated_and_said(knobbed, caplog):
    with caplog.at_level(logging.INFO, "lte_lightning"):
        lte_lightning.set_sparsity(knobbed, 0.6)
        assert caplog.messages == []
        expected = lte_lightning.set_sparsity(knobbed, 0.7)
    assert caplog.messages == ["sparsity 0.7 is interpolated between 0.6 and 0.8, which were calibrated"]
    assert expected == pytest.approx(0.7, abs=0.01)
    assert measured(knobbed, batches_of(knobbed)) == pytest.approx(0.7, abs=0.03)
    low, high = (setting.thresholds[0] for setting in kept_table(knobbed).settings[1:])
    logit = torch.tensor([low, high], dtype=torch.float64).logit().mean()
    assert next(iter(expert_ffns(knobbed).values())).threshold == pytest.approx(float(logit.sigmoid()))


@pytest.mark.parametrize("wrong", [0.29, 0.81, -1.0, float("nan")])
def test_outside_of_the_table_is_refused_and_nothing_changed(wrong, knobbed):
    lte_lightning.set_sparsity(knobbed, 0.6)
    before = [ffn.threshold for ffn in expert_ffns(knobbed).values()]
    with pytest.raises(UserError, match=r"was calibrated for 0.3 to 0.8; .* lte calibrate FOLDER"):
        lte_lightning.set_sparsity(knobbed, wrong)
    assert [ffn.threshold for ffn in expert_ffns(knobbed).values()] == before


def test_a_model_without_a_table_or_in_another_mode(knobbed, build):
    with pytest.raises(UserError, match="no table of thresholds"):
        lte_lightning.set_sparsity(sparse("llama", build), 0.5)
    lte_lightning.set_mode(knobbed, "soft")
    with pytest.raises(UserError, match="in mode 'soft', where every expert runs"):
        lte_lightning.set_sparsity(knobbed, 0.5)


def test_a_compiled_model_follows_without_another_compilation(knobbed):
    compiled = torch.compile(knobbed, backend="aot_eager", fullgraph=True)
    ids_BT, outputs = torch.randint(3, 64, (2, 5)), []
    with torch.no_grad():
        compiled(ids_BT)
        with torch.compiler.set_stance("fail_on_recompile"):
            for sparsity in (0.8, 0.3, 0.5, None):
                lte_lightning.set_sparsity(knobbed, sparsity)
                outputs.append(compiled(ids_BT).logits)
                torch.testing.assert_close(outputs[-1], knobbed(ids_BT).logits)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_a_captured_graph_follows(knobbed):
    knobbed.to("cuda")
    lte_lightning.set_backend(knobbed)
    ids_BT = torch.randint(3, 64, (1, 5), device="cuda")
    with torch.no_grad():
        knobbed(ids_BT, use_cache=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = knobbed(ids_BT, use_cache=False).logits
        for sparsity in (0.8, 0.3):
            lte_lightning.set_sparsity(knobbed, sparsity)
            graph.replay()
            torch.testing.assert_close(logits, knobbed(ids_BT, use_cache=False).logits)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half().float(), copy.deepcopy])
def test_a_cast_does_not_round_the_threshold(cast, knobbed):
    lte_lightning.set_sparsity(knobbed, 0.8)
    before = [ffn.threshold for ffn in expert_ffns(knobbed).values()]
    ffns = expert_ffns(cast(knobbed)).values()
    assert [ffn.threshold for ffn in ffns] == before
    assert [ffn.tau.dtype for ffn in ffns] == [torch.float32] * 2
    assert [ffn.tau.item() for ffn in ffns] == pytest.approx(before, rel=1e-6)


# The folder


def test_a_folder_keeps_the_table_and_where_the_knob_stood(knobbed, tmp_path):
    lte_lightning.save_pretrained(knobbed, tmp_path / "a")
    loaded = lte_lightning.from_pretrained(tmp_path / "a")
    assert kept_table(loaded) == kept_table(knobbed)
    assert {ffn.threshold for ffn in expert_ffns(loaded).values()} == {0.5}  # loading is unchanged
    lte_lightning.set_sparsity(loaded, 0.8)
    lte_lightning.save_pretrained(loaded, tmp_path / "b")
    again = lte_lightning.from_pretrained(tmp_path / "b")
    ids_BT = torch.randint(3, 64, (2, 5))
    with torch.no_grad():
        assert torch.equal(again(ids_BT).logits, loaded(ids_BT).logits)
        lte_lightning.set_sparsity(again, None)
        lte_lightning.set_sparsity(knobbed, None)
        torch.testing.assert_close(again(ids_BT).logits, knobbed(ids_BT).logits)  # by another backend


def test_a_folder_without_a_table_loads_as_before(build, tmp_path):
    model = sparse("llama", build)
    lte_lightning.save_pretrained(model, tmp_path / "a")
    assert not (tmp_path / "a" / THRESHOLDS_FILE).exists()
    loaded = lte_lightning.from_pretrained(tmp_path / "a")
    assert kept_table(loaded) is None
    ids_BT = torch.randint(3, 64, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids_BT).logits, model(ids_BT).logits)  # by another backend


def test_a_table_does_not_outlive_its_weights(knobbed, tmp_path, caplog):
    lte_lightning.save_pretrained(knobbed, tmp_path / "a")
    loaded = lte_lightning.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        next(loaded.parameters()).add_(1.0)
    lte_lightning.save_pretrained(loaded, tmp_path / "b")
    assert "the weights have changed since the model's thresholds were calibrated" in caplog.text
    assert not (tmp_path / "b" / THRESHOLDS_FILE).exists()
    lte_lightning.set_sparsity(loaded, 0.6)
    with pytest.raises(UserError, match=r"2 layers have another threshold .* set_sparsity\(model, None\)"):
        lte_lightning.save_pretrained(loaded, tmp_path / "c")
    (tmp_path / "b" / THRESHOLDS_FILE).write_text((tmp_path / "a" / THRESHOLDS_FILE).read_text())
    with pytest.raises(LayoutError, match="was calibrated for other weights"):
        lte_lightning.from_pretrained(tmp_path / "b")


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.update(format=2),
        lambda c: c.pop("settings"),
        lambda c: c.update(settings=[]),
        lambda c: c["settings"].reverse(),
        lambda c: c["settings"][0]["thresholds"].__setitem__(0, 1.5),
        lambda c: c["settings"][0].update(reached="much"),
        lambda c: c["settings"][0]["thresholds"].pop(),
        lambda c: c["settings"][0]["thresholds"].__setitem__(0, "0.5"),
        lambda c: c["settings"][0]["thresholds"].__setitem__(0, True),
        lambda c: c["settings"][0]["per_layer"].pop(),
        lambda c: c.update(chosen=0.99),
        lambda c: c.update(more=1),
    ],
)
def test_a_damaged_table_is_named(damage, knobbed, tmp_path):
    lte_lightning.save_pretrained(knobbed, tmp_path / "a")
    content = json.loads((tmp_path / "a" / THRESHOLDS_FILE).read_text())
    damage(content)
    (tmp_path / "a" / THRESHOLDS_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{THRESHOLDS_FILE}|table of thresholds"):
        lte_lightning.from_pretrained(tmp_path / "a")


def test_a_table_that_is_nested_too_deep(knobbed, tmp_path):
    lte_lightning.save_pretrained(knobbed, tmp_path / "a")
    (tmp_path / "a" / THRESHOLDS_FILE).write_text("[" * 100_000)
    with pytest.raises(LayoutError, match=f"{THRESHOLDS_FILE} is damaged: it is nested too deep"):
        lte_lightning.from_pretrained(tmp_path / "a")

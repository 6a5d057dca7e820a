"""What an evaluation's rows are worth: its metric on rows that are drawn anew."""

import math
import statistics

import pytest
import torch
from torchmetrics import PearsonCorrCoef
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lte_lightning.core.model.head import IGNORED
from lte_lightning.tasks import Generation
from lte_lightning.tasks.bootstrap import DRAWS, RowDraws
from lte_lightning.tasks.language_model import Perplexity
from lte_lightning.tasks.metrics import ClassMetric


def accuracies(right_N, batches=1):
    draws = RowDraws(ClassMetric("accuracy", ["no", "yes"]), "accuracy")
    labels_N = torch.ones(len(right_N), dtype=torch.long)
    for right, labels in zip(right_N.long().chunk(batches), labels_N.chunk(batches), strict=True):
        draws.update(right, labels)
    return draws.compute()["draws"]


def test_their_spread_is_the_standard_error():
    right_N = torch.rand(500, generator=torch.Generator().manual_seed(1)) < 0.8
    share, found = float(right_N.float().mean()), accuracies(right_N)
    assert len(found) == DRAWS
    assert statistics.fmean(found) == pytest.approx(share, abs=0.01)
    assert statistics.stdev(found) == pytest.approx(math.sqrt(share * (1 - share) / 500), rel=0.25)


def test_a_draw_takes_the_same_rows_of_every_evaluation():
    right_N = torch.rand(300, generator=torch.Generator().manual_seed(2)) < 0.7
    assert accuracies(right_N) == accuracies(right_N, batches=7)
    one_more_N = right_N.clone()
    one_more_N[torch.nonzero(~right_N)[0]] = True
    gaps = [b - a for a, b in zip(accuracies(right_N), accuracies(one_more_N), strict=True)]
    # the row is drawn k times, and k / 300 is what it is worth
    assert all(abs(300 * gap - round(300 * gap)) < 1e-3 and gap > -1e-6 for gap in gaps)
    assert statistics.fmean(gaps) == pytest.approx(1 / 300, rel=0.3)


def test_the_metric_need_not_be_a_mean():
    generator = torch.Generator().manual_seed(3)
    x_N = torch.randn(400, generator=generator)
    y_N = x_N + torch.randn(400, generator=generator)
    draws = RowDraws(PearsonCorrCoef(), "pearson")
    draws.update(x_N, y_N)
    found = draws.compute()["draws"]
    assert statistics.fmean(found) == pytest.approx(float(torch.corrcoef(torch.stack([x_N, y_N]))[0, 1]), abs=0.02)
    assert 0.01 < statistics.stdev(found) < 0.05


def test_a_row_of_text_brings_its_tokens():
    draws = RowDraws(Perplexity(), "perplexity")
    draws.update(torch.tensor([2.0, 30.0]), torch.tensor([2, 10]))
    once, twice, both = (math.exp(value) for value in (1.0, 3.0, 32 / 12))
    assert {round(value, 4) for value in draws.compute()["draws"]} == {round(v, 4) for v in (once, twice, both)}


def test_where_the_metric_is_not_defined_there_is_nothing():
    draws = RowDraws(PearsonCorrCoef(), "pearson")
    draws.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    found = draws.compute()["draws"]
    assert None in found  # one row, drawn twice
    assert any(value == pytest.approx(1.0) for value in found if value is not None)


def test_rows_are_forgotten_once_they_are_computed():
    draws = RowDraws(PearsonCorrCoef(), "pearson")
    draws.update(torch.randn(9), torch.randn(9))
    assert draws.compute()
    assert draws.compute() == {}


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_rows_of_a_language_model_add_up_to_its_loss(kind):
    torch.manual_seed(0)
    module = Generation(task="e2e", pretrained="none")
    if kind == "decoder":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        module.net = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
    else:
        module.net = T5ForConditionalGeneration(
            T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ).eval()
    ids_BT = torch.randint(2, 32, (5, 9))
    labels_BT = ids_BT.clone()
    labels_BT[torch.arange(9) > torch.tensor([[8], [3], [5], [6], [7]])] = IGNORED
    batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels_BT}
    with torch.no_grad():
        outputs = module.run_model(batch)
        loss, tokens = module.outputs_for_metric(outputs, batch)
        loss_B, tokens_B = module.by_rows((loss, tokens), outputs, batch)
        alone = module.run_model({key: value[1:2] for key, value in batch.items()})
    assert loss_B.shape == tokens_B.shape == (5,)
    assert int(tokens_B.sum()) == int(tokens)
    assert float(loss_B.sum()) == pytest.approx(float(loss), rel=1e-5)
    assert float(loss_B[1] / tokens_B[1]) == pytest.approx(float(alone.loss), rel=1e-4)

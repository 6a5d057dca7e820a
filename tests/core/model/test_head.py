"""A head that runs only where a label asks for it: the same loss, the same gradients, fewer logits."""

import pytest
import torch
from torch.testing import assert_close

from lte_lightning.core.model.head import IGNORED, run_where_asked


@pytest.fixture
def asked(batch):
    """Prompts of two, three and one tokens, padding, and one answer within which something does not count."""
    prompt_BT = torch.arange(7) < torch.tensor([[2], [3], [1]])
    labels_BT = batch["input_ids"].masked_fill(prompt_BT | (batch["attention_mask"] == 0), IGNORED)
    labels_BT[0, 4] = IGNORED
    return batch | {"labels": labels_BT}


def test_loss_and_gradients_are_the_model_s_own(build, decoder_family, asked):
    model = build(decoder_family, "lm", dropout=0.0).train()
    expected = model(**asked)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = run_where_asked(model, asked)
    found.loss.backward()
    assert_close(found.loss, expected.loss)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], msg=lambda text, name=name: f"{name}: {text}")
    where = (asked["labels"][:, 1:] != IGNORED).nonzero()
    assert where.shape[0] == 4 + 2 + 1
    assert_close(found.logits[0], expected.logits[where[:, 0], where[:, 1]])
    with torch.no_grad():  # and the model is as it was
        assert model(**asked).logits.shape == expected.logits.shape


def test_a_first_label_is_never_asked_for_and_no_label_has_no_loss(build, batch):
    labels_BT = torch.full_like(batch["input_ids"], IGNORED)
    labels_BT[:, 0] = 5
    for labels in (labels_BT, torch.full_like(labels_BT, IGNORED)):
        found = run_where_asked(build("llama", "lm"), batch | {"labels": labels})
        assert found.loss.isnan()
        assert found.logits.shape == (1, 0, 64)

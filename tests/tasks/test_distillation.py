import pytest
import torch
from torch.nn import functional

from lte_lightning.errors import UserError
from lte_lightning.tasks.distillation import Distillation, divergence


def test_divergence_is_kl_of_the_teacher_over_rows():
    student_NC, teacher_NC = torch.randn(5, 7), torch.randn(5, 7)
    p, q = teacher_NC.softmax(-1), student_NC.softmax(-1)
    assert divergence(student_NC, teacher_NC).item() == pytest.approx(
        (p * (p / q).log()).sum(-1).mean().item(), rel=1e-5
    )
    assert divergence(teacher_NC, teacher_NC).item() == pytest.approx(0.0, abs=1e-6)


def test_half_the_divergence_and_half_the_label_loss_have_the_gradient_of_soft_labels():
    student_NC, teacher_NC, labels_N = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7), torch.randint(7, (5,))
    (0.5 * functional.cross_entropy(student_NC, labels_N) + 0.5 * divergence(student_NC, teacher_NC)).backward()
    soft_NC = 0.5 * functional.one_hot(labels_N, 7) + 0.5 * teacher_NC.softmax(-1)
    torch.testing.assert_close(student_NC.grad, (student_NC.detach().softmax(-1) - soft_NC) / 5)


def test_a_single_output_is_a_regression():
    assert divergence(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])).item() == 2.0


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_none_of_these(share):
    with pytest.raises(UserError, match="it is a share of the loss, 0 to 1"):
        Distillation(share, None)


def test_a_teacher_that_nobody_asks():
    with pytest.raises(UserError, match="teacher is folder, but distillation is 0"):
        Distillation(0.0, "folder")

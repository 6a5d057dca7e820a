import pytest

from lte_lightning.errors import UserError
from lte_lightning.tasks import Classification


def weights_over_the_stage(**options):
    module = Classification(task="sst2", pretrained="none", separability_weight=0.4, **options)
    found = []
    for module.stage_progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        found.append(module.separability_weight_now())
    return found


def test_lambda_grows_in_the_second_half_by_default():
    assert weights_over_the_stage() == pytest.approx([0, 0, 0, 0.2, 0.4])


def test_lambda_grows_between_start_and_end():
    found = weights_over_the_stage(separability_start=0.25, separability_end=0.75)
    assert found == pytest.approx([0, 0, 0.2, 0.4, 0.4])


def test_lambda_jumps_where_start_and_end_agree():
    found = weights_over_the_stage(separability_start=0.5, separability_end=0.5)
    assert found == pytest.approx([0, 0, 0.4, 0.4, 0.4])


def test_lambda_is_constant_as_in_the_paper_s_text():
    assert weights_over_the_stage(separability_start=0.0, separability_end=0.0) == pytest.approx(5 * [0.4])


@pytest.mark.parametrize("shares", [(-0.1, 1.0), (0.6, 0.5), (0.0, 1.1)])
def test_shares_out_of_order(shares):
    with pytest.raises(UserError, match="0 <= start <= end <= 1"):
        weights_over_the_stage(separability_start=shares[0], separability_end=shares[1])

import random
import statistics

import pytest

from lte_lightning.results import Results
from lte_lightning.sweep.paired import paired_difference


def results(value, draws=None, metric="accuracy"):
    fixed = {"task": "sst2", "dense": 0.9, "hard_before": None, "sparsity": 0.8, "sparsity_per_layer": None, "seed": 0}
    return Results.of(
        {**fixed, "metric": metric, "hard": value, "draws": draws, "flops_per_token": 1.0, "dense_flops_per_token": 2.0}
    )


def fit(generator, quality, rows, seed_noise):
    """Right or wrong on 400 rows, some hard for everybody; and what 100 draws of the rows say."""
    seed_shift = generator.gauss(0, seed_noise)
    right = [generator.random() < quality + seed_shift + 0.5 * (ease - 0.5) for ease in rows]
    draws = []
    for k in range(100):
        chooser = random.Random(k)
        chosen = [chooser.randrange(len(rows)) for _ in rows]
        draws.append(statistics.fmean(right[i] for i in chosen))
    return results(statistics.fmean(right), draws)


def test_equal_methods_are_seldom_told_apart_and_different_ones_often():
    generator, alike, apart = random.Random(0), 0, 0
    for _ in range(60):
        rows = [generator.random() for _ in range(400)]
        ours, theirs = ({s: fit(generator, 0.7, rows, 0.01) for s in range(3)} for _ in range(2))
        alike += paired_difference(ours, theirs).verdict == "not told apart"
        better = {s: fit(generator, 0.82, rows, 0.01) for s in range(3)}
        apart += paired_difference(better, theirs).verdict == "better"
    assert alike >= 54  # 57 on average
    assert apart >= 50


def test_rows_that_both_find_hard_cancel():
    generator = random.Random(1)
    draws = [generator.gauss(0.8, 0.02) for _ in range(100)]
    above = [draw + 0.01 for draw in draws]
    found = paired_difference({0: results(0.81, above)}, {0: results(0.8, draws)})
    assert found.mean == pytest.approx(0.01)
    assert found.half == pytest.approx(0.0, abs=1e-9)
    assert found.verdict == "better"
    assert "rows alone" in found.text()


def test_seeds_that_disagree_are_not_told_apart():
    draws = [0.8] * 100
    ours = {seed: results(value, draws) for seed, value in enumerate((0.86, 0.80, 0.80))}
    theirs = {seed: results(0.8, draws) for seed in range(3)}
    found = paired_difference(ours, theirs)
    # the mean is 0.02, and the seeds' standard error 0.02: Student's t of two degrees of freedom is 4.3
    assert found.half == pytest.approx(4.303 * 0.02, rel=0.01)
    assert found.verdict == "not told apart"
    assert found.seeds == 3
    assert "rows and seeds" in found.text()


@pytest.mark.parametrize(("metric", "verdict"), [("accuracy", "better"), ("perplexity", "worse")])
def test_the_verdict_knows_which_way_is_better(metric, verdict):
    ours = {seed: results(value, None, metric) for seed, value in enumerate((3.60, 3.61, 3.62))}
    theirs = {seed: results(value, None, metric) for seed, value in enumerate((3.50, 3.51, 3.52))}
    found = paired_difference(ours, theirs)
    assert found.verdict == verdict
    assert not found.rows
    assert found.text(2) == f"+0.10 (+0.10 to +0.10, seeds): {verdict}"


def test_one_seed_of_an_earlier_version_tells_nothing():
    found = paired_difference({0: results(0.9)}, {0: results(0.8)})
    assert found.half is None
    assert found.verdict == "not told apart"
    assert found.text() == "+0.1000, one seed: not told apart"


def test_seeds_are_paired_and_others_left_out():
    ours = {0: results(0.9), 1: results(0.8), 7: results(0.1)}
    theirs = {1: results(0.7), 0: results(0.8), 5: results(0.9)}
    assert paired_difference(ours, theirs).mean == pytest.approx(0.1)
    assert paired_difference(ours, {5: results(0.9)}) is None


def test_undefined_values_have_no_difference():
    assert paired_difference({0: results(None)}, {0: results(0.8)}) is None

"""Baselines that are not the package's, from the command line to the report."""

import sys

import pytest
import torch
from torch.nn import functional

from lte_lightning.selection import Predictor, Ranking, register_selector, registry

pytestmark = pytest.mark.usefixtures("forgets_selectors")


@pytest.fixture(scope="module")
def dense(tiny, lightning, tmp_path_factory):
    """A fine-tuned model to start from."""
    outcome = lightning(tmp_path_factory.mktemp("dense"), tiny.config(epochs=(1, 0, 0)), "fit")
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture
def fit(dense, tiny, lightning, tmp_path):
    """`fit(router_epochs, *args, **lte)` adapts the dense model."""

    def fit(router_epochs, *args, **lte):
        model = {"model.init_args.lte": {"expert_size": 8, "target_sparsity": 0.5} | lte}
        start = {"model.init_args.init_from": str(dense.run / "model")}
        return lightning(tmp_path, tiny.config(epochs=(0, router_epochs, 1), **model, **start), "fit", *args)

    return fit


def test_five_lines_go_from_the_command_line_to_the_report(fit, lightning, tmp_path):
    @register_selector("inputs")
    class Inputs(Ranking):
        label, caveat = "largest inputs", "a toy"

        def importance(self, given):
            return functional.adaptive_avg_pool1d(given.abs().float(), self.shape.experts)

    outcome = fit(0, "--model.lte.selector", "inputs")
    assert outcome.code == 0, outcome.err
    assert outcome.results["sparsity"] == outcome.results["sparsity_before"] == 0.5
    for words in (("cost", "--model", outcome.run / "model"), ("report", outcome.run, "--out", "page")):
        done = lightning(tmp_path, None, *words)
        assert done.code == 0, done.err
    assert "largest inputs (a toy)" in (tmp_path / "page" / "index.html").read_text()
    del registry._selectors["inputs"]  # whoever reads the report need not have the code
    assert lightning(tmp_path, None, "report", outcome.run, "--out", "again").code == 0
    assert "largest inputs (a toy)" in (tmp_path / "again" / "index.html").read_text()


def test_a_class_path_on_the_command_line(fit, tiny, lightning, tmp_path, monkeypatch):
    (tmp_path / "loud_baselines.py").write_text(
        "from lte_lightning.selection import Ranking\n"
        "class Loudest(Ranking):\n"
        "    rule = 'level'\n"
        "    reads = 'gate'\n"
        "    def importance(self, given):\n"
        "        return self.magnitude(given)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    outcome = fit(0, "--model.lte.selector", "loud_baselines.Loudest")
    assert outcome.code == 0, outcome.err
    assert outcome.results["sparsity_before"] == pytest.approx(0.5, abs=0.03)  # it was calibrated
    unknown = fit(0, "--model.lte.selector", "loud_baselines.Quietest")
    assert unknown.code == 1
    assert "cannot import the selector 'loud_baselines.Quietest'" in unknown.err

    del registry._selectors["loud_baselines.Loudest"], sys.modules["loud_baselines"]
    words = ("test", "--model.init_from", outcome.run / "model")
    config = tiny.config(**{"model.init_args.lte": None})
    refused = lightning(tmp_path, config, *words)
    assert refused.code == 1
    assert (
        "was converted with a selector that is not known here: unknown selector 'loud_baselines.Loudest'" in refused.err
    )
    assert "loud_baselines" not in sys.modules  # a name in a file imports nothing


def test_one_that_learns_by_imitation(fit):
    @register_selector("guesser")
    class Guesser(Predictor):
        label = "guesser"

        def inner_width(self):
            return 4

        def imitation_loss(self, activity):
            return functional.mse_loss(self.predict(activity.x_ND), self.magnitude(activity.hidden_NF))

    outcome = fit(1, "--model.lte.selector", "guesser")
    assert outcome.code == 0, outcome.err
    assert outcome.results["sparsity"] == 0.5
    assert outcome.results["soft"] is not None


def test_one_that_never_learns_has_no_router_stage(fit):
    @register_selector("chance")
    class Chance(Ranking):
        def __init__(self, *args):
            super().__init__(*args)
            self.weight = torch.nn.Parameter(torch.ones(self.shape.experts, self.shape.width))

        def importance(self, given):
            return functional.linear(given, self.weight).float()

    outcome = fit(1, "--model.lte.selector", "chance")
    assert outcome.code == 1
    assert "selector 'chance' has nothing to train; set stages.router.epochs to 0" in outcome.err

"""Names of selectors: what may be registered, what is refused, and what is said then."""

import re
from pathlib import Path

import pytest
import torch

from lte_lightning import LteConfig, convert, from_pretrained, save_pretrained
from lte_lightning.core.model.folder import LayoutError
from lte_lightning.errors import UserError
from lte_lightning.selection import (
    SELECTORS,
    Description,
    FfnShape,
    Predictor,
    Ranking,
    Selector,
    import_selector,
    register_selector,
    registry,
    selector_class,
    selector_names,
)

BASELINES = ["cats", "d2dmoe", "dejavu", "kla", "moefication", "narrow", "none", "random", "sigmamoe", "softmax"]
BUILT_IN = ["router", *BASELINES, "teal", "wanda"]


pytestmark = pytest.mark.usefixtures("forgets_selectors")


class First(Ranking):
    """The same experts for every token."""

    def importance(self, given):
        return -torch.arange(self.shape.experts).expand(*given.shape[:-1], -1).float()


def test_the_built_in_ones():
    assert selector_names() == BUILT_IN
    assert set(SELECTORS) == set(BUILT_IN)
    with pytest.raises(TypeError):
        SELECTORS["mine"] = First


def test_a_name_of_ones_own():
    assert register_selector("mine")(First) is First
    assert selector_class("mine") is First
    assert LteConfig(selector="mine", target_sparsity=0.5).selector == "mine"
    register_selector("mine")(type("First", (First,), {"__module__": __name__, "__qualname__": "First"}))  # a notebook


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(UserError, match=re.escape(f"unknown selector 'psychic'; there are {', '.join(BUILT_IN)}")):
        LteConfig(selector="psychic", target_sparsity=0.5)
    with pytest.raises(UserError, match=r"import your class first, or pass its path as --model\.lte\.selector"):
        selector_class("my_module.First")


class NoImportance(Ranking):
    pass


class NoLoss(Predictor):
    pass


class Guess(First):
    reads = "mind"


class Nothing(Selector):
    learns, calibration = "balance", "common"


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("kla", First, "'kla' is taken by lte_lightning.selection.kla.KeepLargest; choose another"),
        ("a b", First, "'a b' is no name for a selector"),
        ("", First, "'' is no name for a selector"),
        ("mine", dict, "must be a subclass of lte_lightning.selection.Selector"),
        ("mine", NoImportance, "NoImportance must define importance"),
        ("mine", NoLoss, "NoLoss must define imitation_loss"),
        ("mine", Nothing, "Nothing must define forward, flops_per_token, make, balance_loss, set_common_level"),
        ("mine", Guess, "reads is 'mind'; there are input, gate, hidden"),
    ],
)
def test_what_is_refused(name, kind, message):
    with pytest.raises(UserError, match=re.escape(message)):
        register_selector(name)(kind)


def test_the_rule_says_how_a_ranking_is_calibrated():
    kinds = {rule: type("Mine", (First,), {"rule": rule}).calibration for rule in ("top", "level", "common", "fixed")}
    assert kinds == {"top": "none", "level": "sequential", "common": "common", "fixed": "dense"}
    with pytest.raises(UserError, match="Mine has the rule 'most'; there are top, level, common, fixed"):
        type("Mine", (First,), {"rule": "most"})


def test_what_is_read_of_the_gate_is_charged():
    for reads, whole in (("input", 0), ("gate", 1), ("hidden", 0)):
        assert type("Mine", (First,), {"reads": reads})(FfnShape(4, 3), 0.5).whole_projections() == whole


def test_class_paths_are_imported_on_demand(tmp_path, monkeypatch):
    (tmp_path / "my_baselines.py").write_text(
        "import torch\n"
        "from lte_lightning.selection import Ranking\n"
        "class Mine(Ranking):\n"
        "    def importance(self, given):\n"
        "        return given.abs().sum(-1, keepdim=True).expand(*given.shape[:-1], self.shape.experts).float()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import_selector("my_baselines.Mine")
    import_selector("my_baselines.Mine")
    assert selector_class("my_baselines.Mine").__name__ == "Mine"
    import_selector("kla")  # a name is none
    for name, why in {"my_baselines.Yours": "has no attribute", "no_module.Mine": ".* on PYTHONPATH"}.items():
        with pytest.raises(UserError, match=f"cannot import the selector '{name}': .*{why}"):
            import_selector(name)


def test_installed_packages_name_theirs_as_entry_points(monkeypatch):
    class Entry:
        name = "theirs"

        def load(self):
            return First

    def entry_points(group, name="theirs"):
        return [Entry()] if (group, name) == ("lte_lightning.selectors", "theirs") else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert "theirs" in selector_names()
    assert selector_class("theirs") is First


def test_a_saved_model_needs_its_selector_and_says_so(tmp_path, tiny_bert):
    register_selector("mine")(First)
    model = convert(tiny_bert, LteConfig(8, selector="mine", target_sparsity=0.5), progress=False)
    folder = save_pretrained(model, tmp_path / "saved")
    assert from_pretrained(folder).lte_config == model.lte_config
    del registry._selectors["mine"]
    with pytest.raises(
        LayoutError, match=r"saved was converted with a selector that is not known here: unknown .*mine"
    ):
        from_pretrained(folder)


def test_what_a_class_says_of_itself():
    assert First.describe(8, 0.5) == Description("First")
    kinds = {name: kind.describe(8, 0.5) for name, kind in SELECTORS.items()}
    assert {name for name, said in kinds.items() if said.learns_with_task} == {"router", "sigmamoe", "softmax"}
    assert {name for name, said in kinds.items() if said.graded} == {"router", "sigmamoe", "softmax"}
    assert {name for name, said in kinds.items() if said.scales} == {"sigmamoe", "softmax"}
    assert {name for name, said in kinds.items() if said.oracle} == {"kla"}
    assert {name for name, said in kinds.items() if said.prunes} == {"wanda"}
    assert {name for name, kind in SELECTORS.items() if kind.learns == "imitation"} == {
        *("d2dmoe", "dejavu", "moefication")
    }


@pytest.mark.parametrize("kind", [kind for name, kind in SELECTORS.items() if name != "narrow"])
def test_every_method_names_its_source(kind):
    """In full, with an arXiv id; what is not published apart refers to what is."""
    text = " ".join(kind.__doc__.split())
    assert (
        re.search(r'Source: .*: ".*", .*arXiv \d{4}\.\d{5}', text) or "(see `Router`)" in text or kind.label == "floor"
    )


def test_all_are_documented():
    table = (Path(__file__).parents[2] / "docs" / "baselines.md").read_text()
    assert {name for name in SELECTORS if f"\n| `{name}` |" in table} == set(BUILT_IN)
    assert {name for name in SELECTORS if f"``{name}``" in LteConfig.__doc__} == set(BUILT_IN)


def test_a_kernel_may_compute_the_router_alone():
    router = SELECTORS["router"].make(FfnShape(4, 3), LteConfig(), None)
    assert router.linear() == (router.weight, router.bias)

    class Doubled(SELECTORS["router"]):
        def forward(self, x_BTD):
            return super().forward(2 * x_BTD)

    class Cooled(SELECTORS["router"]):
        def logits(self, x_BTD):
            return super().logits(x_BTD) / 2

    for kind in (Doubled, Cooled):
        assert kind.make(FfnShape(4, 3), LteConfig(), None).linear() is None
    assert (
        SELECTORS["kla"].make(FfnShape(4, 3), LteConfig(1, selector="kla", target_sparsity=0.5), None).linear() is None
    )

"""What a report knows of the methods, by the selector of a run and never by the name that a sweep gave it."""

from collections.abc import Callable
from typing import Any

Lte = dict[str, Any]  # what lte_config.json says under "lte"

# Names of runs that no sweep named
NAMES = {
    "router": "LTE",
    "none": "floor",
    "narrow": "narrower dense",
    "kla": "KLA (oracle)",
    "moefication": "MoEfication",
    "dejavu": "Deja Vu",
    "teal": "TEAL",
    "cats": "CATS",
    "d2dmoe": "D2DMoE",
    "softmax": "noisy top-k softmax",
    "random": "random routers",
    "sigmamoe": "sigma-MoE",
    "wanda": "Wanda",
}
# What a figure of a method must not be read without
MARKS = {
    "kla": "oracle",
    "cats": "pays for the whole gate",
    "d2dmoe": "without its sparsity fine-tuning",
    "teal": "skips weights, not neurons",
    "wanda": "skips weights, not neurons, and as if zeros were skipped",
}
GATED = ("softmax", "sigmamoe")  # their gates scale what an expert gives, so even with all experts they are not dense
LEARNS_WITH_MODEL = ("router", *GATED)  # selectors whose router stage trains the model's weights, too


def _is_group(lte: Lte) -> bool:
    return lte.get("expert_size", 1) > 1


def _selects(selector: str) -> Callable[[Lte], bool]:
    return lambda lte: lte.get("selector") == selector


# What the paper and its successors compare: a report says which of them it lacks. MoEfication's ground truth is not
# MoEfication, whose router is learned
RIVALS: dict[str, Callable[[Lte], bool]] = {
    "narrower dense": _selects("narrow"),
    "KLA of single neurons": lambda lte: lte.get("selector") == "kla" and not _is_group(lte),
    "MoEfication's ground truth": lambda lte: lte.get("selector") == "kla" and _is_group(lte),
    **{NAMES[key]: _selects(key) for key in ("moefication", "dejavu", "teal", "cats", "d2dmoe", "softmax", "random")},
    **{NAMES[key]: _selects(key) for key in ("sigmamoe", "wanda", "router")},
}


def method_name(lte: Lte) -> str:
    """Returns what a method is called that no sweep has named."""
    selector = lte.get("selector", "router")
    if selector == "kla" and _is_group(lte):
        return "MoEfication, ground truth (oracle)"
    if selector == "narrow" and lte.get("target_sparsity") == 0:
        return "dense, trained on"
    if selector == "narrow" and lte.get("expert_size") == 1:
        return "narrower dense, single neurons"
    return NAMES.get(selector, selector)


def marked(method: str, lte: Lte) -> str:
    """Returns a method's name with what its figures must not be read without."""
    mark = MARKS.get(lte.get("selector", "router"), "")
    return method if not mark or mark in method else f"{method} ({mark})"

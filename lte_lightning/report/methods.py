"""The methods' descriptions, taken from their selectors and not from the names in a sweep."""

from dataclasses import fields
from typing import Any

from lte_lightning.selection import SELECTORS, Description

Lte = dict[str, Any]  # what lte_config.json says under "lte", and under "selector" of its selector
# What the paper and its successors compare: a report says which of them it lacks. Experts of one neuron and of several
# may be two methods
_OURS = [kind for kind in SELECTORS.values() if kind.__module__.startswith("lte_lightning.")]
RIVALS = tuple(dict.fromkeys(name for kind in _OURS for size in (1, 2) if (name := kind.name_if_missing(size))))


def describe(lte: Lte) -> Description:
    """Returns the description of a run's selector: from the registry, else as the run saved it."""
    name = str(lte.get("selector", "router"))
    kind = SELECTORS.get(name)
    if kind is not None:
        return kind.describe(lte.get("expert_size"), lte.get("target_sparsity"))
    stored = lte.get("description")
    stored = stored if isinstance(stored, dict) else {}
    sound = {
        field.name: stored[field.name] for field in fields(Description) if type(stored.get(field.name)) is field.type
    }
    return Description(**{"label": name} | sound)


def method_name(lte: Lte) -> str:
    """Returns the name of a method that no sweep has named."""
    return describe(lte).label


def marked(method: str, lte: Lte) -> str:
    """Returns a method's name with its caveat."""
    caveat = describe(lte).caveat
    return method if not caveat or caveat in method else f"{method} ({caveat})"

"""The names of selectors; other packages add theirs with `register_selector`."""

import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TypeVar, get_args

from lte_lightning.errors import UserError, meant
from lte_lightning.selection.base import Calibration, Learns, Reads, Selector

ENTRY_POINTS = "lte_lightning.selectors"
_selectors: dict[str, type[Selector]] = {}
SELECTORS: Mapping[str, type[Selector]] = MappingProxyType(_selectors)  # what is registered now, by name
S = TypeVar("S", bound=type[Selector])


def register_selector(name: str) -> Callable[[S], S]:
    """Registers a selector under a name that ``model.lte.selector`` and `LteConfig` then accept.

    >>> @register_selector("first")
    ... class First(Ranking):
    ...     label = "the first experts"
    ...
    ...     def importance(self, inputs):
    ...         return -torch.arange(self.shape.experts, device=inputs.device).expand(*inputs.shape[:-1], -1).float()

    A package that is installed may name its selectors as entry points of the group ``lte_lightning.selectors``; they
    are imported when they are first asked for. A class that is registered again, as in a notebook, replaces the former.

    Args:
        name: Its name; letters, digits and ``_.-:``.

    Returns:
        A decorator of the class.

    Raises:
        UserError: From the decorator, if the class is no selector, lacks a method that its attributes promise, or the
            name is taken.
    """

    def register(kind: S) -> S:
        _check(name, kind)
        known = _selectors.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise UserError(
                f"the selector name {name!r} is taken by {known.__module__}.{known.__qualname__}; choose another"
            )
        _selectors[name] = kind
        return kind

    return register


def selector_class(name: str) -> type[Selector]:
    """Returns the selector of a name.

    Raises:
        UserError: If there is none; the message lists the known names.
    """
    if name not in _selectors:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            register_selector(name)(entry.load())
    if name not in _selectors:
        advice = "; import your class first, or pass its path as --model.lte.selector" if "." in str(name) else ""
        names = selector_names()
        raise UserError(f"unknown selector {name!r}{meant(name, names)}; there are {', '.join(names)}{advice}")
    return _selectors[name]


def selector_names() -> list[str]:
    """Returns the names of all selectors, LTE's router first and the baselines in the order of the alphabet."""
    names = {*_selectors, *(entry.name for entry in entry_points(group=ENTRY_POINTS))}
    return sorted(names, key=lambda name: (name != "router", name))


def import_selector(name: str) -> None:
    """Imports a selector by its class path, such as ``my_module.MySelector``, and registers it under that name.

    For names that a user typed: a class path imports code, so never call this for a name from a file.

    Raises:
        UserError: If there is no such class.
    """
    module, _, attribute = name.rpartition(".")
    if not module or name in _selectors:
        return
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"cannot import the selector {name!r}: {error}; is its folder on PYTHONPATH?") from error
    except AttributeError as error:
        raise UserError(f"cannot import the selector {name!r}: {error}") from error
    register_selector(name)(kind)


def _check(name: str, kind: type[Selector]) -> None:
    if not name or not all(letter.isalnum() or letter in "_.-:" for letter in name):
        raise UserError(f"{name!r} is no name for a selector; use letters, digits and _.-:")
    if not (isinstance(kind, type) and issubclass(kind, Selector)):
        raise UserError(f"selector {name!r} is {kind!r}; it must be a subclass of lte_lightning.selection.Selector")
    for attribute, values in (("reads", Reads), ("learns", Learns), ("calibration", Calibration)):
        if getattr(kind, attribute) not in get_args(values):
            raise UserError(
                f"selector {name!r}: {attribute} is {getattr(kind, attribute)!r}; there are "
                f"{', '.join(get_args(values))}"
            )
    if missing := kind.missing_methods():
        raise UserError(f"selector {name!r}: {kind.__name__} must define {', '.join(missing)}")

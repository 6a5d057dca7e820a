"""Packages that import what they re-export on first use (PEP 562)."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def on_first_use(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns a package's ``__getattr__`` and ``__dir__``.

    The package imports the same names under ``TYPE_CHECKING``, so that type checkers and editors see them.

    Args:
        package: The package's ``__name__``.
        modules: The package's own modules, without its name, and what is re-exported of each.
    """
    homes = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *homes})


def load_all(*packages: str) -> None:
    """Imports everything that packages re-export, so that subclasses of a base are known by their short names."""
    for package in map(import_module, packages):
        for name in package.__all__:
            getattr(package, name)

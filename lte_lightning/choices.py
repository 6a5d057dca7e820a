"""What was chosen for a fit: its configuration by dotted names, as its results keep it and MLflow shows it."""

import re
from collections.abc import Mapping
from typing import Any

from lte_lightning.errors import UserError
from lte_lightning.results import read_results
from lte_lightning.store import find_run, shown

_SECRET = re.compile(r"(^|_)(uri|password|token|secret|key)$")  # options in whose values an address or a secret may be


def options_by_name(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the options of a resolved configuration by dotted names, a class by its last name, without secrets.

    Args:
        config: As plain types; what is None is left out.
        prefix: Of all names.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            path, inner = str(value.get("class_path", "")), value.get("init_args")
            own = {"class": path.rpartition(".")[2]} if path else {}
            found |= options_by_name(value if inner is None else own | inner, f"{name}.")
        elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            found |= options_by_name({str(i): each for i, each in enumerate(value)}, f"{name}.")
        elif value is not None and not _SECRET.search(key):
            found[name] = shown(value) if isinstance(value, str) else value
    return found


def options_of_start(init_from: str | None) -> dict[str, Any]:
    """Returns the options of the fit whose model a fit starts from, named ``start.``; none where it kept none."""
    folder = find_run(init_from) if init_from else None
    try:
        known = read_results(folder).options if folder else None
    except UserError:  # it was not finished, or is of another version
        known = None
    return {f"start.{name}": value for name, value in (known or {}).items() if not name.startswith("start.")}

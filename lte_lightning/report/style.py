"""Styles of the methods: each has its colour, marker and line, the same in every picture of every report."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import matplotlib

from lte_lightning.report.material import Material
from lte_lightning.report.run import Setting

LIGHT = {"ink": "#1a1a1a", "paper": "#ffffff", "grid": "#d8d8d8"}
DARK = {"ink": "#e6e6e6", "paper": "#1b1d21", "grid": "#3c4048"}
INK = "ink"  # black on light pages, white on dark ones


@dataclass(frozen=True)
class Style:
    """The look of a method's line."""

    colour: str
    marker: str
    line: str = "-"
    width: float = 1.4

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of matplotlib's ``plot`` and ``Line2D``."""
        colour = matplotlib.rcParams["text.color"] if self.colour == INK else self.colour
        size = 7 if self.width > 2 else 5
        return {"color": colour, "marker": self.marker, "linestyle": self.line, "linewidth": self.width} | {
            "markersize": size
        }


STRONG = Style("#e5383b", "o", width=2.6)
# By selector, all legible on light and dark pages. Oracles are grey and dashed, magnitude thresholds dash-dotted.
KNOWN = {
    "narrow": Style(INK, "s"),
    "kla": Style("#858585", "D", "--"),
    "moefication": Style("#1098a0", "v"),
    "dejavu": Style("#3a86e8", "^"),
    "cats": Style("#a8742a", "P", "-."),
    "d2dmoe": Style("#a05de0", "X"),
    "softmax": Style("#d63fa8", "<"),
    "sigmamoe": Style("#2e9e4f", ">"),
    "random": Style("#8a8a10", "*"),
    "teal": Style("#d9730d", "p", "-."),
    "wanda": Style("#6a6ff0", "h", "-."),
}
# Differences of a second method with the same selector
AGAIN = (("d", ":"), ("8", "--"), ("H", "-."), ("1", ":"), ("2", "--"))


def selectors(settings: Iterable[Setting]) -> dict[str, str]:
    """Returns the selector of each method, LTE's first and the others in their order.

    LTE is the method with that name, or the first with its routers.
    """
    by_method: dict[str, str] = {}
    for setting in settings:
        by_method.setdefault(setting.method, setting.runs[0].lte.get("selector", "router"))
    ours = (
        "LTE"
        if "LTE" in by_method
        else next((name for name, selector in by_method.items() if selector == "router"), None)
    )
    return {name: by_method[name] for name in sorted(by_method, key=lambda name: name != ours)}


def ours(settings: Iterable[Setting]) -> str | None:
    """Returns the name of LTE among the settings, None if it is missing."""
    name, selector = next(iter(selectors(settings).items()), (None, ""))
    return name if name == "LTE" or selector == "router" else None


def styles(material: Material) -> dict[str, Style]:
    """Returns the style of each method, in the order of a legend.

    A method has the style of its selector; a second method with the same selector differs in marker and line. Variants
    of LTE, and unknown selectors, take styles that no method of the report uses.
    """
    methods, lte_method = selectors(material.settings()), ours(material.settings())
    free = [style for name, style in KNOWN.items() if name not in methods.values()] or list(KNOWN.values())
    by_method: dict[str, Style] = {}
    uses: dict[str, int] = {}
    for method, selector in methods.items():
        if method == lte_method:
            by_method[method] = STRONG
            continue
        own_style = KNOWN.get(selector)
        key = selector if own_style else "others"
        count = uses[key] = uses.get(key, -1) + 1
        pool = [own_style] if own_style else free
        turn, style = count // len(pool), pool[count % len(pool)]
        marker, line = (style.marker, style.line) if turn == 0 else AGAIN[(turn - 1) % len(AGAIN)]
        by_method[method] = replace(style, marker=marker, line=style.line if style.line == "--" else line)
    return by_method

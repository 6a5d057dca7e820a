"""Shows what ``lte bench --against`` measured: quality against tokens per second."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from lte_lightning.bench.rates import Rate, plot_rates
from lte_lightning.report.pictures import Draw
from lte_lightning.report.tables import Table

SHOWN = (
    "engine",
    "dtype",
    "way",
    "sparsity",
    "tokens_per_second",
    "least",
    "most",
    "ratio",
    "quality",
    "threads",
    "load",
)
TEXT = (
    "Tokens per second of torch's dense model, of ours, and of the dense model in other engines: the same inputs, "
    "threads and number of tokens, by turns. Medians over rounds; ratio is that to the first row."
)


def groups(rates: Sequence[tuple[str, Rate]]) -> dict[str, list[Rate]]:
    """Returns the rows that belong in one picture, by its title."""
    found: dict[str, list[Rate]] = {}
    for file, rate in rates:
        what = f"{rate.new_tokens} new tokens" if rate.new_tokens else f"{rate.sequences} x {rate.length} tokens"
        found.setdefault(f"{rate.model}, {what}, {rate.threads} threads ({Path(file).name})", []).append(rate)
    return found


def picture(group: Sequence[Rate]) -> Draw:
    """Draws a group."""

    def draw(figure: Figure) -> str:
        plot_rates(figure.add_subplot(), group)
        return "; ".join(f"{rate.name} {rate.tokens_per_second:.4g} tokens per second" for rate in group)

    return draw


def claim(group: Sequence[Rate]) -> str:
    """Says which is the fastest."""
    fastest = max(group, key=lambda rate: rate.tokens_per_second)
    return f"Fastest: {fastest.name}, {fastest.tokens_per_second:.4g} tokens per second."


def table(group: Sequence[Rate], caption: str, name: str) -> Table:
    """Returns a group's rows."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "–" if math.isnan(value) else f"{value:.4g}"
        return str(value or "–")

    return Table(list(SHOWN), [[cell(asdict(rate)[name]) for name in SHOWN] for rate in group], caption, name)

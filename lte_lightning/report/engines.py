"""Shows the results of ``lte bench --against``: quality against tokens per second."""

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
    "Tokens per second of the dense model in torch, of the sparse model (ours), and of the dense model in other "
    "engines. All ran in turn with the same inputs, threads and number of tokens. Values are medians over rounds; "
    "ratio is relative to the first row."
)


def groups(rates: Sequence[tuple[str, Rate]]) -> dict[str, list[Rate]]:
    """Returns the rows of each picture, by its title."""
    by_title: dict[str, list[Rate]] = {}
    for file, rate in rates:
        call = f"{rate.new_tokens} new tokens" if rate.new_tokens else f"{rate.sequences} x {rate.length} tokens"
        by_title.setdefault(f"{rate.model}, {call}, {rate.threads} threads ({Path(file).name})", []).append(rate)
    return by_title


def picture(group: Sequence[Rate]) -> Draw:
    """Draws a group."""

    def draw(figure: Figure) -> str:
        plot_rates(figure.add_subplot(), group)
        return "; ".join(f"{rate.name} {rate.tokens_per_second:.4g} tokens per second" for rate in group)

    return draw


def claim(group: Sequence[Rate]) -> str:
    """Names the fastest row."""
    fastest = max(group, key=lambda rate: rate.tokens_per_second)
    return f"Fastest: {fastest.name}, {fastest.tokens_per_second:.4g} tokens per second."


def table(group: Sequence[Rate], caption: str, name: str) -> Table:
    """Returns the table of a group's rows."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "–" if math.isnan(value) else f"{value:.4g}"
        return str(value or "–")

    return Table(list(SHOWN), [[cell(asdict(rate)[name]) for name in SHOWN] for rate in group], caption, name)

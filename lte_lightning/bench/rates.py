"""Tokens per second of whole models: one row for each engine, type and way, as it is printed, kept and drawn."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lte_lightning.errors import UserError
from lte_lightning.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATES_FILE = "engines.csv"  # in a run's folder
COLOURS = {
    "dense": "#555555",
    "ours": "#d1495b",
    "llama.cpp": "#31688e",
    "openvino": "#35b779",
    "onnxruntime": "#e9a03b",
    "narrow": "#8b5fbf",
}
MARKS = {"f32": "s", "bf16": "o", "f16": "D", "int8": "^", "int4": "v"}


@dataclass(frozen=True)
class Rate:
    """One row.

    Args:
        model: The folder or shape.
        engine: ``dense`` is torch's dense model, ``ours`` the sparse one, ``narrow`` a narrower dense one on the
            same kernels; else a name of `ENGINES`, with ``narrow`` behind it where it runs the narrower model.
        dtype: Of the weights.
        way: ``eager``, ``compiled``, ``fused`` or ``captured`` in torch; empty of other engines.
        phase: ``decode`` or ``forward``.
        sequences: Sequences at once.
        length: Tokens of a prompt, or of a row.
        new_tokens: Tokens decoded behind a prompt, 0 in a forward pass.
        sparsity: Share of the FFN neurons that did not run on the prompt or batch, or that a narrower model lacks.
        threads: Of each.
        tokens_per_second: The median over rounds.
        least: The slowest round.
        most: The fastest round.
        ratio: Times the first dense row.
        metric: What quality is measured by; empty if it is not.
        quality: On all validation rows; NaN if it is not measured.
        version: Of the engine.
        processor: The machine's.
        load: Load average of the last minute.
    """

    model: str
    engine: str
    dtype: str
    way: str
    phase: str
    sequences: int
    length: int
    new_tokens: int
    sparsity: float
    threads: int
    tokens_per_second: float
    least: float
    most: float
    ratio: float
    metric: str
    quality: float
    version: str
    processor: str
    load: float

    @property
    def name(self) -> str:
        """For people."""
        sparsity = f" at {self.sparsity:.0%}" if self.engine == "ours" or self.is_narrow else ""
        return " ".join(filter(None, (self.engine, self.dtype, self.way))) + sparsity

    @property
    def is_narrow(self) -> bool:
        """Whether it is of a narrower dense model."""
        return "narrow" in self.engine.split()

    @property
    def colour(self) -> str:
        """Of its engine."""
        return COLOURS.get(self.engine.split()[0], "#8b5fbf")


def is_rates(file: Path) -> bool:
    """Says whether a CSV file is of whole models beside other engines."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            return {"engine", "tokens_per_second"} <= {*lines.readline().strip().split(",")}
    except (OSError, UnicodeDecodeError):
        return False  # what is wrong with it is said by who reads it


def read_rates(file: Path) -> list[tuple[str, Rate]]:
    """Returns the rows, each with the file's name.

    Raises:
        UserError: If a column is missing, or a value in it cannot be.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the benchmark {file}: {error}") from error
    found = []
    for number, row in enumerate(rows, 2):
        values = {}
        for field in fields(Rate):
            text = row.get(field.name)
            try:
                values[field.name] = field.type(text)  # type: ignore[operator]  # str, int or float
                if text is None or (field.name == "tokens_per_second" and not 0 < values[field.name] < math.inf):
                    raise ValueError
            except (TypeError, ValueError):
                raise UserError(
                    f"{file}, line {number}: {field.name} is {text!r}; run lte bench again, or remove the line"
                ) from None
        found.append((str(file), Rate(**values)))
    if not found:
        raise UserError(f"{file} has columns, but no figures; run lte bench again, or leave it out of --bench")
    return found


def show_rates(rates: Sequence[Rate]) -> None:
    """Prints a table, and how many times as fast as each dense row each of ours is."""
    first = rates[0]
    what = (
        f"{first.new_tokens} new tokens behind {first.length}" if first.new_tokens else f"rows of {first.length} tokens"
    )
    several = f"{first.sequences} sequences, " if first.sequences > 1 else ""
    print(f"\n{first.model}, {first.phase}: {several}{what}")
    quality = f"{first.metric:>14}" if first.metric else ""
    print(f"{'':34}{'tokens/s':>10}  {'slowest .. fastest':^22}{'ratio':>7}{quality}")
    for r in rates:
        quality = f"{r.quality:14.4g}" if r.metric else ""
        span = f"{r.least:.1f} .. {r.most:.1f}"
        print(f"{r.name:34}{r.tokens_per_second:10.1f}  {span:^22}{r.ratio:7.2f}{quality}")
    ours, others = [r for r in rates if r.engine == "ours"], [r for r in rates if r.engine != "ours"]
    if ours:
        print(f"\n{'ours, times as fast as':34}" + "".join(f"{letter(i):>7}" for i in range(len(ours))))
        for other in others:
            ratios = "".join(f"{r.tokens_per_second / other.tokens_per_second:7.2f}" for r in ours)
            print(f"{other.name:34}{ratios}")
        print("; ".join(f"{letter(i)}: {r.name}" for i, r in enumerate(ours)))


def letter(number: int) -> str:
    """Returns a, b, ... for a column's head."""
    return chr(ord("a") + number % 26)


def draw_rates(rates: Sequence[Rate], path: Path) -> None:
    """Draws quality over tokens per second, or the tokens per second alone where no quality was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    plot_rates(figure.subplots(), rates)
    with whole_file(path, "wb") as file:
        figure.savefig(file, dpi=150, format=path.suffix.lstrip(".") or "png")


def plot_rates(axes: "Axes", rates: Sequence[Rate]) -> None:
    """Draws the same into given axes."""
    measured = [r for r in rates if not math.isnan(r.quality)]
    if not measured:
        for i, r in enumerate(reversed(rates)):
            axes.barh(i, r.tokens_per_second, color=r.colour)
            span = [[r.tokens_per_second - r.least], [r.most - r.tokens_per_second]]
            axes.errorbar(r.tokens_per_second, i, xerr=span, color="0.2", capsize=2, linewidth=1)
        axes.set_yticks(range(len(rates)), [r.name for r in reversed(rates)])
        axes.set_xlabel("tokens per second")
        return
    for r in measured:
        mark = MARKS.get(r.dtype, "o")
        filled = r.colour if r.way != "compiled" else "none"
        style: Any = "left" if r.is_narrow else "full"
        axes.plot(
            *(r.tokens_per_second, r.quality, mark),
            color=r.colour, markerfacecolor=filled, fillstyle=style, label=r.name,
        )  # fmt: skip
    axes.set_xlabel("tokens per second")
    axes.set_ylabel(measured[0].metric)
    if measured[0].metric == "perplexity":
        axes.invert_yaxis()  # better is up
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))

"""Tokens per second of whole models: one row for each engine, type and way; printed, saved and drawn."""

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
    """The speed and quality of one model in one engine.

    Args:
        model: The folder or shape.
        engine: ``dense`` is torch's dense model, ``ours`` the sparse model, ``narrow`` a narrower dense model on the
            same kernels; else a name of `ENGINES`, followed by ``narrow`` if it runs the narrower model.
        dtype: Type of the weights.
        way: ``eager``, ``compiled``, ``fused`` or ``captured`` in torch; empty for other engines.
        phase: ``decode`` or ``forward``.
        sequences: Sequences per batch.
        length: Tokens of a prompt, or of a row.
        new_tokens: Tokens decoded after a prompt; 0 for a forward pass.
        sparsity: Share of the FFN neurons that did not run on the prompt or batch, or that a narrower model lacks.
        threads: Threads of each engine.
        tokens_per_second: The median over rounds.
        least: The slowest round.
        most: The fastest round.
        ratio: Speed relative to the first dense row.
        metric: Name of the quality metric; empty if quality was not measured.
        quality: The metric on all validation rows; NaN if it was not measured.
        version: Version of the engine.
        processor: Name of the processor.
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
        """The row's label, for people."""
        sparsity = f" at {self.sparsity:.0%}" if self.engine == "ours" or self.is_narrow else ""
        return " ".join(filter(None, (self.engine, self.dtype, self.way))) + sparsity

    @property
    def is_narrow(self) -> bool:
        """Whether the row is for a narrower dense model."""
        return "narrow" in self.engine.split()

    @property
    def colour(self) -> str:
        """Colour of the engine."""
        return COLOURS.get(self.engine.split()[0], "#8b5fbf")


def is_rates(file: Path) -> bool:
    """Whether a CSV file holds rates of whole models."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            return {"engine", "tokens_per_second"} <= {*lines.readline().strip().split(",")}
    except (OSError, UnicodeDecodeError):
        return False  # the reader of the file reports the error


def read_rates(file: Path) -> list[tuple[str, Rate]]:
    """Returns the rows, each with the file's name.

    Raises:
        UserError: If a column is missing, or a value is invalid.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the benchmark {file}: {error}") from error
    rates = []
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
        rates.append((str(file), Rate(**values)))
    if not rates:
        raise UserError(f"{file} has columns, but no rows; run lte bench again, or leave it out of --bench")
    return rates


def show_rates(rates: Sequence[Rate]) -> None:
    """Prints a table, and the speed-up of each sparse row over each dense row."""
    first = rates[0]
    what = (
        f"{first.new_tokens} new tokens after {first.length}" if first.new_tokens else f"rows of {first.length} tokens"
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
    """Returns a, b, ... for the head of a column."""
    return chr(ord("a") + number % 26)


def draw_rates(rates: Sequence[Rate], path: Path) -> None:
    """Draws quality over tokens per second, or only the tokens per second if quality was not measured."""
    from matplotlib.figure import Figure

    bars = len(rates) if all(math.isnan(r.quality) for r in rates) else 0
    figure = Figure(figsize=(7.5, max(4.6, 0.6 + 0.22 * bars)), layout="constrained")  # labels of bars must not overlap
    plot_rates(figure.subplots(), rates)
    with whole_file(path, "wb") as file:
        figure.savefig(file, dpi=150, format=path.suffix.lstrip(".") or "png")


def plot_rates(axes: "Axes", rates: Sequence[Rate]) -> None:
    """Draws the picture of `draw_rates` into the given axes."""
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
        axes.set_yscale("log")
        axes.invert_yaxis()  # better is up
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))

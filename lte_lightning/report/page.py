"""Puts a report together: one HTML page with everything inside, and its pictures as PNG files."""

import base64
import itertools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from lte_lightning.core.errors import UserError
from lte_lightning.report import pictures, tables
from lte_lightning.report.collect import Material
from lte_lightning.report.tables import Table, pick

HEAT_ROWS = 16


@dataclass(frozen=True)
class Picture:
    """A picture and what it says."""

    name: str
    text: str
    light: bytes
    dark: bytes

    @property
    def light_uri(self) -> str:
        """The picture for light pages, as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.light).decode()}"

    @property
    def dark_uri(self) -> str:
        """The picture for dark pages, as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.dark).decode()}"


@dataclass
class Section:
    """A heading, what it is about, and pictures and tables below it."""

    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def write_report(material: Material, out: str | Path, title: str, tolerance: float | None = None) -> Path:
    """Writes ``index.html`` and the pictures into a folder.

    Args:
        material: What to report.
        out: The folder; it is made if need be.
        title: The page's.
        tolerance: What of the metric may be lost in the FLOPs table; by default the paper's for perplexity (0.5) and
            ROUGE-L (0.05), and 0.01 for other metrics.

    Returns:
        The page.

    Raises:
        UserError: If the folder cannot be written.
    """
    sections = _sections(material, tolerance)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(files(__package__).joinpath("page.html").read_text()).render(
        title=title,
        about=material.about,
        summary=tables.summary(material, tolerance),
        not_run=tables.not_run(material),
        sections=sections,
        commands=[(run.folder.name, run.command) for run in material.runs],
        versions=tables.versions(material),
        machine=f"{platform.machine()}, {platform.system()}",
        written=time.strftime("%Y-%m-%d"),
        version=version("lte-lightning"),
    )
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for section in sections:
            for picture in section.pictures:
                (out / f"{picture.name}.png").write_bytes(picture.light)
        staging = out / "index.html.tmp"
        staging.write_text(page, encoding="utf-8")
        staging.replace(out / "index.html")
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {error}; choose another --out") from error
    return out / "index.html"


def _sections(material: Material, tolerance: float | None) -> list[Section]:
    found = []
    for task, metric in material.tasks.items():
        if not (settings := material.settings(task)):
            continue
        section = Section(
            f"Quality against sparsity: {task}",
            f"Means of {metric} on the validation rows; bars span the least and the greatest over the seeds. Dashed: "
            "the dense model. Dotted: the floor, every FFN expert off and adapted alike; a curve says as much as it "
            "stands above it.",
        )
        draw = pictures.quality(material, task)
        section.pictures.append(_picture(f"quality-{task}", f"{metric} of {task} against sparsity", draw))
        if any(setting.values("span_kept") for setting in settings):
            draw = pictures.quality(material, task, "span_kept")
            section.pictures.append(_picture(f"span-{task}", f"share of the span kept on {task}", draw))
        section.tables += [tables.levels(material, task), tables.everything(material, task)]
        found.append(section)
    found.append(
        Section(
            "FLOPs per token at the same tolerated loss",
            "In the form of the paper's Table 1: the fewest GFLOPs (2³⁰) per token of the layers' projections, routers "
            "and predictors included, among the settings whose mean lost no more than is tolerated.",
            tables=[tables.flops(material, tolerance)],
        )
    )
    return found + _details(material) + _latency(material)


def _details(material: Material) -> list[Section]:
    found = []
    for task in material.tasks:
        settings = material.settings(task)
        layered = [s for s in settings if all(run.results["sparsity_per_layer"] for run in s.runs)]
        if layered:
            rows = pick(layered, HEAT_ROWS)
            height = max(2.6, 1.4 + 0.28 * len(rows))
            draw = pictures.layers(rows)
            picture = _picture(f"layers-{task}", f"sparsity per layer on {task}", draw, height)
            found.append(Section(f"Sparsity per layer: {task}", "Means over the seeds.", [picture]))
        scored = [s for s in settings if any(run.histogram for run in s.runs)]
        if scored:
            picture = _picture(f"scores-{task}", f"scores on {task}", pictures.scores(pick(scored, 5)))
            text = "Of all layers and seeds; a well separated selection has few scores near its threshold."
            found.append(Section(f"Distribution of the scores: {task}", text, [picture]))
        united = [s for s in settings if any(run.results.get("union_sparsity") for run in s.runs)]
        if united:
            picture = _picture(f"union-{task}", f"union sparsity on {task}", pictures.union(pick(united, 5)))
            text = (
                "A batch must load every expert that any of its tokens needs: all tokens of its rows in an encoder and "
                "in classification, one token of each row where a model generates. Means over layers and seeds, on "
                "validation rows."
            )
            found.append(Section(f"Union sparsity: {task}", text, [picture]))
    return found


def _latency(material: Material) -> list[Section]:
    if not material.bench:
        return []
    keys = ("shape", "scope", "phase", "tokens")
    rows = sorted(material.bench, key=lambda row: tuple(str(row[key]) for key in keys))
    text = (
        "How many times as fast as dense, the router's time included. Dotted: what the bytes moved allow at most. "
        "Dashed: dense."
    )
    section = Section("Latency against sparsity", text)
    for i, (_, group) in enumerate(itertools.groupby(rows, key=lambda row: tuple(str(row[key]) for key in keys))):
        mine = list(group)
        label = ", ".join(f"{mine[0][key]}" for key in keys)
        section.pictures.append(_picture(f"latency-{i}", f"speed-up of {label}", pictures.latency(mine)))
    heads = ["shape", "scope", "phase", "dtype", "tokens", "sparsity", "backend", "threads", "dense_ms", "ms", "ratio"]
    heads += ["router_ms", "bound", "share_of_bound", "load"]
    cells = [
        [f"{row.get(key):g}" if isinstance(row.get(key), float) else str(row.get(key) or "–") for key in heads]
        for row in rows
    ]
    section.tables.append(Table(heads, cells))
    return [section]


def _picture(name: str, text: str, draw: Callable[[Figure], None], height: float = 3.6) -> Picture:
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    return Picture(safe, text, *pictures.render(draw, height))

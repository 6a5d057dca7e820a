"""The sections of a report: first quality against sparsity and cost, then the details."""

import base64
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lte_lightning.report import bench, claims, details, engines, pictures, tables
from lte_lightning.report.material import Material
from lte_lightning.report.methods import describe
from lte_lightning.report.names import counted, in_words
from lte_lightning.report.pictures import FLOPS, SPARSITY, SPEED
from lte_lightning.report.run import Run, Setting
from lte_lightning.report.style import Style, ours, selectors, styles
from lte_lightning.report.tables import Table, pick
from lte_lightning.sweep.table import mean_text

# Where methods are compared at one sparsity, and how far a setting may lie from it to be compared
AT, REACH = 0.8, 0.15
OWN_ROWS = 16  # of LTE in a heat map
LONG = 12  # rows; a longer table of differences is folded


@dataclass(frozen=True)
class Picture:
    """A picture with its caption, its alternative text, and the function that draws it."""

    name: str
    text: str
    alt: str
    draw: pictures.Draw
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
    """A heading, an introduction, pictures, tables, and folded tables."""

    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)


def main_sections(material: Material, tolerance: float | None) -> list[Section]:
    """Returns the sections that a reader sees first."""
    looks, sections = styles(material), []
    for task, metric in material.tasks.items():
        if not (settings := material.settings(task)):
            continue
        title = material.title(task)
        section = Section(f"Quality against sparsity and cost: {title}", _how_to_read(material, task))
        axes = [("quality", "FFN sparsity", SPARSITY), ("flops", "FLOPs per token", FLOPS)]
        if any(setting.values(SPEED.key) for setting in settings):
            axes.append(("speed", "measured tokens per second", SPEED))
        for name, against, axis in axes:
            draw = pictures.quality(material, task, looks, across=axis)
            heading = f"{_capital(in_words(metric))} on {title} against {against}"
            section.pictures.append(_picture(f"{name}-{task}", heading, claims.within(settings, tolerance, axis), draw))
        section.tables.append(tables.levels(material, task))
        if (differences := tables.differences(material, task)) is not None:
            (section.tables if len(differences.rows) <= LONG else section.folded).append(differences)
        section.folded.append(tables.everything(material, task))
        sections.append(section)
    sections.append(
        Section(
            "FLOPs per token at the same tolerated loss",
            "This table has the form of the paper's Table 1. It gives the fewest GFLOPs (2³⁰) per token of the layers' "
            "projections, routers and predictors included, among the settings whose mean loss is within the tolerance.",
            tables=[tables.flops(material, tolerance)],
        )
    )
    return sections


def _how_to_read(material: Material, task: str) -> str:
    settings = material.settings(task)
    spread = "bars span the range over the seeds"
    if all(len(setting.runs) < 2 for setting in settings):
        spread = "each setting has one seed, so its spread is unknown"
    undefined = [pictures.setting_label(setting) for setting in settings if setting.undefined]
    rows = "the rows of lightning test" if any(run.test for run in material.of(task)) else "the validation rows"
    text = (
        f"{_subject(material, task)} Points are means of {in_words(material.tasks[task])} on {rows}; {spread}. Cost is "
        "the FLOPs per token of the layers' projections, routers and predictors included, as a share of the dense "
        "model's. Only cost includes what a method pays to choose experts; oracles pay nothing. The dashed line is the "
        f"reference ({material.dense_kind(task)}). The dotted line is the floor: every FFN expert off and "
        f"{material.floor_kind(task)}. Read a curve by its height above the floor; points far below the floor are not "
        "drawn."
    )
    if speeds := [s for run in material.of(task) if (s := run.dense_tokens_per_second)]:
        text += (
            " Speed is that of the whole model, measured at the end of each fit beside its dense twin "
            f"({mean_text(speeds, digits=0)} tokens/s)."
        )
    return text + (f" Not drawn, because a seed's value is undefined: {', '.join(undefined)}." if undefined else "")


def _subject(material: Material, task: str) -> str:
    """Names the model and the data of a section."""
    runs = material.of(task)
    models = [run.options.get("model.pretrained") or run.options.get("start.model.pretrained") for run in runs]
    subjects = {"Model": models, "Data": [run.results.data for run in runs]}
    texts = {noun: ", ".join(dict.fromkeys(map(str, filter(None, names)))) for noun, names in subjects.items()}
    return " ".join(f"{noun}: {names}." for noun, names in texts.items() if names)


def detail_sections(material: Material) -> list[Section]:
    """Returns the detailed sections: spans, layers, scores, batches, and measured time."""
    looks, sections = styles(material), []
    for task in material.tasks:
        settings, title = material.settings(task), material.title(task)
        if any(setting.values("span_kept") for setting in settings):
            spans = [(s, mean) for s in nearest(settings)[0] if (mean := s.mean("span_kept")) is not None]
            shares = [(f"{s.called} at {100 * s.sparsity:.0f}\N{NO-BREAK SPACE}%:", 100 * mean) for s, mean in spans]
            claim = f"Kept by {claims.ranked(shares)}." if shares else ""
            draw = pictures.quality(material, task, looks, "span_kept")
            picture = _picture(f"span-{task}", f"Share of the span kept on {title}", claim, draw)
            text = "The share of the FFNs' contribution that is left: the floor is 0 %, the reference 100 %."
            sections.append(Section(f"Span kept: {title}", text, [picture]))
        for make in (_layers, _scores, _union):
            sections += make(task, title, settings, looks)
    return sections + _latency(material) + _curves(material) + _engines(material)


def nearest(settings: Sequence[Setting], shown: str | None = None) -> tuple[list[Setting], str]:
    """Returns each method's setting nearest to 80 % sparsity, and a description of the choice.

    A method without a setting within 15 points is left out, unless no method has one. The method ``shown`` stays.
    """
    best: dict[str, Setting] = {}
    for setting in sorted(settings, key=lambda setting: abs(setting.sparsity - AT)):
        best.setdefault(setting.method, setting)
    order = selectors(settings)
    close = [best[method] for method in order if abs(best[method].sparsity - AT) <= REACH]
    text = f"Each method is shown at its setting nearest to {100 * AT:.0f} % sparsity, labelled with its sparsity."
    chosen = close or [best[method] for method in order]
    if not close:
        text += f" No method has one within {100 * REACH:.0f} points."
    if lacking := [method for method in order if best[method] not in chosen and method != shown]:
        text += f" Left out, with no setting within {100 * REACH:.0f} points: {', '.join(lacking)}."
    return chosen, text


def _layers(task: str, title: str, settings: Sequence[Setting], looks: Mapping[str, Style]) -> list[Section]:
    # all runs of an experiment have the same number of layers
    with_layers = [setting for setting in settings if setting.values("sparsity_per_layer")]
    if not with_layers:
        return []
    chosen, text = nearest(with_layers, shown=ours(with_layers))
    lte_rows = pick([setting for setting in with_layers if setting.method == ours(with_layers)], OWN_ROWS)
    if lte_rows:
        extent = "all its" if len(lte_rows) < OWN_ROWS else "evenly spread"
        text += f" {lte_rows[0].method} is shown at {extent} settings."
    rows = lte_rows + [setting for setting in chosen if setting.method != ours(with_layers)]
    picture = _picture(
        f"layers-{task}",
        f"Sparsity per layer on {title}",
        claims.by_layer(rows[: len(lte_rows) or 1], AT),
        details.layers(rows),
    )
    return [Section(f"Sparsity per layer: {title}", f"Values are means over the seeds. {text}", [picture])]


def _scores(task: str, title: str, settings: Sequence[Setting], looks: Mapping[str, Style]) -> list[Section]:
    def scored(run: Run) -> bool:
        return describe(run.lte).graded and sum(map(sum, run.histogram)) > 0

    has = [setting for setting in settings if any(map(scored, setting.runs))]
    if not has:
        return []
    chosen, text = nearest(has)
    text = f"Scores of all layers and seeds. {text}"
    if any(map(details.has_threshold, (run for setting in chosen for run in setting.runs))):
        text += " The dashed line is LTE's threshold; well separated scores are rare near it."
    if any(describe(run.lte).scales for setting in chosen for run in setting.runs):
        text += " Softmax and sigma-MoE keep the top experts and have no threshold; the gates of all others are 0."
    text += " The other methods choose experts without scores."
    picture = _picture(f"scores-{task}", f"Scores on {title}", claims.separated(chosen), details.scores(chosen, looks))
    return [Section(f"Distribution of the scores: {title}", text, [picture])]


def _union(task: str, title: str, settings: Sequence[Setting], looks: Mapping[str, Style]) -> list[Section]:
    # pruned weights are the same for all tokens, and no expert is off
    with_unions = [s for s in settings if any(s.values("union_sparsity")) and not describe(s.runs[0].lte).prunes]
    if not with_unions:
        return []
    chosen, choice = nearest(with_unions)
    text = (
        "A batch must load every expert that any of its tokens needs. Its tokens are all tokens of its rows in an "
        "encoder or in classification, and one token of each row if the model generates. Values are means over layers "
        f"and seeds, on validation rows. {choice}"
    )
    picture = _picture(
        f"union-{task}", f"Union sparsity on {title}", claims.idle_in_batch(chosen), details.union(chosen, looks)
    )
    return [Section(f"Union sparsity: {title}", text, [picture])]


def _latency(material: Material) -> list[Section]:
    if not material.bench:
        return []
    text = (
        "Speed-up over dense, the router's time included. The dotted line is the bound that the moved bytes set; the "
        "dashed line is dense."
    )
    section = Section("Latency against sparsity", text)
    groups, several = bench.groups(material.bench), len({row["file"] for row in material.bench}) > 1
    for i, group in enumerate(groups):
        best = max(group, key=lambda row: row["ratio"])
        claim = f"Fastest: {best['backend']}, {best['ratio']:.2f} times at {100 * best['sparsity']:.0f} %."
        heading = f"Speed-up of {bench.title(group, several)}"
        section.pictures.append(_picture(f"latency-{i}", heading, claim, details.latency(group, several)))
    rows = [row for group in groups for row in group]
    caption = f"All measurements of lte bench: {counted(len(rows), 'row')}"
    section.folded.append(_grid(rows, () if several else ("file",), caption, "latency"))
    return [section]


def _curves(material: Material) -> list[Section]:
    """Returns the results of ``lte curve``: quality against tokens per second of one model at several sparsities."""
    if not material.curves:
        return []
    text = (
        "One calibrated model at the sparsities beside its points, and its dense twin, all measured in turn. Quality "
        "is measured on all validation rows, speed on the whole model."
    )
    section = Section("Quality against measured tokens per second", text)
    for i, (file, points) in enumerate(material.curves.items()):
        metric = bench.metric_of(points[0])
        name = Path(file).stem
        section.pictures.append(
            _picture(
                f"curve-{i}",
                f"{_capital(in_words(metric))} of {name}",
                claims.fastest(points),
                pictures.curve(points, name),
            )
        )
        caption = f"All measurements of {name}: {counted(len(points), 'row')}"
        section.folded.append(_grid(points, ("file",), caption, f"curve-{i}"))
    return [section]


def _grid(rows: Sequence[Mapping[str, Any]], without: Collection[str], caption: str, name: str) -> Table:
    heads = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in without]
    return Table(heads, [[_cell(row.get(key)) for key in heads] for row in rows], caption, name)


def _engines(material: Material) -> list[Section]:
    section = Section("Whole models beside other engines", engines.TEXT)
    for i, (heading, group) in enumerate(engines.groups(material.rates).items()):
        section.pictures.append(_picture(f"engines-{i}", heading, engines.claim(group), engines.picture(group)))
        section.folded.append(engines.table(group, f"All rows of {heading}", f"engines-{i}"))
    return [section] if material.rates else []


def _cell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value or "–")


def names_of_runs(runs: Sequence[Run]) -> list[str]:
    """Returns a name for each run: its method and setting, and its folder if these are not unique."""
    names = []
    for run in runs:
        kind = {"start": "dense start", "floor": "floor"}.get(run.role, run.method)
        setting = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in run.parameters.items())
        names.append(", ".join(filter(None, [run.task, kind, setting, f"seed {run.seed}"])))
    count = Counter(names)
    return [f"{name} ({run.folder.name})" if count[name] > 1 else name for name, run in zip(names, runs, strict=True)]


def _picture(name: str, heading: str, claim: str, draw: pictures.Draw) -> Picture:
    """Renders a picture; its caption says what it is and what it shows."""
    light, dark, description = pictures.render(draw)
    return Picture(safe(name), f"{heading}. {claim}".strip(), f"{heading}: {description}", draw, light, dark)


def safe(name: str) -> str:
    """Returns a name with only characters that suit a file name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

"""Draws docs/knob.png from docs/knob-trials.csv: one model at several sparsities beside a model for each, and dense.

python benchmarks/knob.py     # docs/results.md, "One model for a whole range", has the commands of the fits
"""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"
TITLES = {
    "stsb": "STS-B, MiniLM (6 layers), Pearson x 100",
    "quickstart": "movie reviews, MiniLM (6 layers), accuracy (%)",
}
MODELS = {
    "one model, trained for 30 to 90 %": {"color": "#31688e", "marker": "o"},
    "a model for each sparsity": {"color": "#5a5a5a", "marker": "^", "linestyle": ":"},
}
DENSE = ("dense, trained on", "dense")
LEAST_SPAN = 8.0
"""Points that an axis of quality spans, so that differences within the noise do not look large."""


def draw(axes: Axes, rows: list[dict[str, str]]) -> None:
    """Draws each model's mean over seeds against the sparsity, and a bar from the lowest seed to the highest."""
    for model, style in MODELS.items():
        scores = defaultdict(list)
        for row in rows:
            if row["model"] == model:
                scores[float(row["wanted_sparsity"])].append(100 * float(row["score"]))
        wanted = sorted(scores)
        means = [statistics.mean(scores[share]) for share in wanted]
        below = [mean - min(scores[share]) for mean, share in zip(means, wanted, strict=True)]
        above = [max(scores[share]) - mean for mean, share in zip(means, wanted, strict=True)]
        if wanted:
            counts = {len(scores[share]) for share in wanted}
            label = f"{model} ({'-'.join(map(str, sorted(counts)))} {'seed' if counts == {1} else 'seeds'})"
            axes.errorbar([100 * share for share in wanted], means, [below, above], label=label, capsize=3, **style)
    for model in DENSE:
        if dense := [100 * float(row["score"]) for row in rows if row["model"] == model]:
            label = f"{model} ({len(dense)} {'seed' if len(dense) == 1 else 'seeds'})"
            axes.axhline(statistics.mean(dense), color="#c44e52", linestyle="--", label=label)
    low, high = axes.get_ylim()
    missing = max(LEAST_SPAN - (high - low), 0.0)
    axes.set_ylim(low - 0.75 * missing, high + 0.25 * missing)  # room for the legend
    axes.set(xlabel="FFN neurons that do not run (%)", title=TITLES[rows[0]["task"]])
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)


def main() -> None:
    with (DOCS / "knob-trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, 2), TITLES, strict=True):
        draw(axes, [row for row in rows if row["task"] == task])
        axes.legend(fontsize=8, loc="lower left")
    figure.savefig(DOCS / "knob.png", dpi=150)
    print(DOCS / "knob.png")


if __name__ == "__main__":
    main()

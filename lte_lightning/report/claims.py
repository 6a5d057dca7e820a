"""The captions' claims: one sentence per picture."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lte_lightning.report.bench import metric_of
from lte_lightning.report.details import near_threshold
from lte_lightning.report.names import counted, in_words
from lte_lightning.report.pictures import FLOPS, Axis, setting_label
from lte_lightning.report.run import Setting
from lte_lightning.report.style import selectors
from lte_lightning.report.tolerance import tolerance_of, tolerated


def within(settings: Sequence[Setting], tolerance: float | None, axis: Axis) -> str:
    """Names the sparsity, cost or speed that each method reaches within the tolerated loss."""
    sign = -1 if axis is FLOPS else 1
    methods = {name: [setting for setting in settings if setting.method == name] for name in selectors(settings)}
    limit, best = tolerance_of(settings[0].metric, tolerance), {}
    for mine in methods.values():
        reached = [
            axis.scale * fmean(values)
            for setting in tolerated(mine, tolerance).within
            if (values := setting.values(axis.key))
        ]
        if reached:
            best[mine[0].called] = max(reached, key=lambda value: sign * value)
    if not best:
        return f"No method stays within {limit:g} of the reference."
    order = sorted(best, key=lambda name: -sign * best[name])
    words = ", ".join(f"{name} {best[name]:.0f}{axis.unit}" for name in order)
    remark = " No other method stays within it." if len(best) < len(methods) else ""
    return f"Within {limit:g} of the reference {'down' if sign < 0 else 'up'} to: {words}.{remark}"


def ranked(values: Sequence[tuple[str, float]], shown: int = 3) -> str:
    """Names the best values, and the worst of the others."""
    order = sorted(values, key=lambda pair: -pair[1])
    words = [f"{name} {value:.0f}\N{NO-BREAK SPACE}%" for name, value in order[:shown]]
    if len(order) > shown:
        words.append(f"last {order[-1][0]} {order[-1][1]:.0f}\N{NO-BREAK SPACE}%")
    return ", ".join(words)


def by_layer(settings: Sequence[Setting], sparsity: float) -> str:
    """Names the least and the most sparse layer of the setting nearest to a sparsity."""
    first = min(settings, key=lambda setting: abs(setting.sparsity - sparsity))
    shares = [100 * fmean(layer) for layer in zip(*first.values("sparsity_per_layer"), strict=True)]
    low, high = min(shares), max(shares)
    least, most = shares.index(low), shares.index(high)
    return f"{setting_label(first)}: from {low:.0f} % in layer {least} to {high:.0f} % in layer {most}."


def separated(settings: Sequence[Setting]) -> str:
    """Gives the share of each setting's scores near its threshold."""
    shares = [f"{s.called} {near:.1f} %" for s in settings if (near := near_threshold(s)) is not None]
    return f"Scores within 0.1 of the threshold: {', '.join(shares)}." if shares else ""


def idle_in_batch(settings: Sequence[Setting]) -> str:
    """Gives the share of experts that no token of the largest batch needs."""
    unions = [(setting, union) for setting in settings for union in setting.values("union_sparsity")]
    rows = max((size for _, union in unions for size in union), key=int)
    shares = {
        shown.called: [100 * union[rows] for owner, union in unions if owner is shown and rows in union]
        for shown in settings
    }
    means = [(name, fmean(values)) for name, values in shares.items() if values]
    return f"No token of {counted(int(rows), 'row')} needs: {ranked(means)} of the experts."


def fastest(points: Sequence[Mapping[str, Any]]) -> str:
    """Gives the speed and the quality of the fastest point of ``lte curve``."""
    metric, best = metric_of(points[0]), max(points, key=lambda point: point["tokens_per_second"])
    speed, text = best["tokens_per_second"], f"with {in_words(metric)} {best[metric]:.4g}"
    gain = ""
    if dense := next((point for point in points if point["setting"] == "dense" and point is not best), None):
        gain = f", {speed / dense['tokens_per_second']:.2f} times dense"
        text += f" in place of {dense[metric]:.4g}"
    return f"Fastest: {speed:.0f} tokens/s at {100 * best['sparsity']:.0f} % sparsity{gain}, {text}."

"""What the figures of a fit (``results.json``) mean: which is better, what it came to, what of the span it kept."""

from typing import Any

LOWER_IS_BETTER = ("perplexity", "loss")


def better(metric: str, one: float, other: float) -> bool:
    """Says whether a figure of a metric is better than another."""
    return one < other if metric.startswith(LOWER_IS_BETTER) else one > other


def expert_stage_ran(results: dict[str, Any]) -> bool:
    """Says whether a fit got to its expert stage, so that its ``hard`` is a figure or not defined."""
    return "expert" in (results.get("seconds_per_stage") or {})


def final_view(results: dict[str, Any]) -> str:
    """Returns which figure a fit has come to.

    That is ``hard`` if the expert stage ran, else ``hard_before``, or ``dense`` of a fit that selected nothing; even
    where it is not defined (a correlation of constant predictions), for no other says the same.
    """
    if results["hard"] is not None or expert_stage_ran(results):
        return "hard"
    return "dense" if results.get("hard_before") is None and results.get("sparsity") is None else "hard_before"


def span_kept(results: dict[str, Any]) -> float | None:
    """Returns (value - floor) / (dense - floor) with what the fit has come to, or None where it means nothing.

    ``dense`` is the model that the fit started from, which was not trained on as long as it.
    """
    dense, floor, view = results["dense"], results.get("floor"), final_view(results)
    value = results[view]
    if view == "dense" or dense is None or value is None or floor is None:
        return None
    return (value - floor) / (dense - floor) if better(results["metric"], dense, floor) else None

"""Results of `lightning test` on a run: ROUGE-L, or another task (MMLU), beside the metric of its fit.

The paper's Table 1 and its figures 6 and 7 use such metrics, which a fit does not measure.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lte_lightning.report.run import Run
from lte_lightning.results import Results, read_evaluation

TESTS = "test*.json"  # in a run folder
# The first of these that a test has is reported, unless it is the fit's own metric
METRICS = ("rouge_l", "macro_accuracy", "accuracy", "perplexity")
COSTS = ("sparsity", "sparsity_per_layer", "flops_per_token", "dense_flops_per_token", "bound")
# Results that only a fit has
OWN = ("soft", "hard_before", "hard", "dense", "floor", "union_sparsity", "speedup", "draws")


def tested(run: Run) -> Iterator[Run]:
    """Yields a run once more for each ``test.json`` and ``test-<task>.json`` in its folder, with that test's values.

    Raises:
        UserError: If such a file is damaged.
    """
    fit, view = run.results, run.results.final_view
    for file in sorted(run.folder.glob(TESTS)):
        evaluation = read_evaluation(file)
        metric = next((name for name in METRICS if isinstance(evaluation.others.get(name), float)), None)
        task = file.stem.removeprefix("test").removeprefix("-") or fit.task
        if metric is None or (task, metric) == (fit.task, fit.metric):
            continue
        value = evaluation.others[metric]
        costs = {key: cost for key in COSTS if (cost := getattr(evaluation, key)) is not None}
        if view == "dense":  # selected nothing, and so has no sparsity; that of its test is 0
            costs = {key: cost for key, cost in costs.items() if "sparsity" not in key}
        replaced: dict[str, Any] = {view: value, "task": task, "metric": metric}
        replaced |= {"floor": value} if run.role == "floor" else {}
        results = Results.of(fit.content() | dict.fromkeys(OWN) | costs | replaced)
        yield replace(run, results=results, histogram=[], parameters=dict(run.parameters), test=file.name)

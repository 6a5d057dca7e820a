"""What `lightning test` has found of runs: ROUGE-L, or another task (MMLU), beside the figure that their fits end with.

The paper's Table 1 and its figures 6 and 7 are in such metrics, which a fit does not measure.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lte_lightning.errors import UserError
from lte_lightning.figures import final_view
from lte_lightning.report.material import Run

TESTS = "test*.json"  # in a run folder
# Of each test the first of these that is there, unless it is what the fit itself is measured by
METRICS = ("rouge_l", "macro_accuracy", "accuracy", "perplexity")
COSTS = ("sparsity", "sparsity_per_layer", "flops_per_token", "dense_flops_per_token", "bound")
# What only the fit has measured
OWN = ("soft", "hard_before", "hard", "dense", "floor", "union_sparsity", "speedup")


def tested(run: Run) -> Iterator[Run]:
    """Yields a run once more for each ``test.json`` and ``test-<task>.json`` in its folder, with that test's figures.

    Raises:
        UserError: If such a file is damaged.
    """
    for file in sorted(run.folder.glob(TESTS)):
        try:
            found: dict[str, Any] = json.loads(file.read_text())
            metric = next((key for key in METRICS if isinstance(found.get(key), float)), None)
            costs = {key: found[key] for key in COSTS if key in found}
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file} is damaged: {error!r}; test the run again, or remove it") from error
        task = file.stem.removeprefix("test").removeprefix("-") or run.results["task"]
        if metric is None or (task, metric) == (run.results["task"], run.results["metric"]):
            continue
        figures = {"value": found[metric], final_view(run.results): found[metric]}
        if run.role == "floor":
            figures["floor"] = found[metric]
        if run.role == "start":
            costs = {key: value for key, value in costs.items() if "sparsity" not in key}
        results = run.results | dict.fromkeys(OWN) | costs | figures | {"task": task, "metric": metric}
        yield replace(run, results=results, histogram=[], parameters=dict(run.parameters), test=file.name)

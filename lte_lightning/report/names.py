"""Full names of data, metrics and models for titles and axes."""

import re
from collections.abc import Collection
from pathlib import PurePosixPath

from lte_lightning.core.model.card import public_name
from lte_lightning.results import LOWER_IS_BETTER, Results

_WORDS = {
    **{"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "qqp": "QQP", "stsb": "STS-B", "mnli": "MNLI", "qnli": "QNLI"},
    **{"rte": "RTE", "e2e": "E2E", "xsum": "XSum", "wikitext": "WikiText", "mmlu": "MMLU", "lm": "text"},
    **{"pearson": "Pearson correlation", "matthews": "Matthews correlation", "rouge_l": "ROUGE-L", "f1": "F1"},
    **{"macro_accuracy": "mean accuracy of the subjects"},
}
_MODELS = "MiniLM MPNet SmolLM2 SmolLM RoBERTa ModernBERT DistilBERT ALBERT BERT ELECTRA GPT LLaMA OPT BART T5 Qwen Phi"
_SPELT = {name.lower(): name for name in _MODELS.split()}
_KNOWN = re.compile("|".join(_SPELT), re.IGNORECASE)


def in_words(name: str) -> str:
    """Returns the full name of a task or a metric, for a title or an axis."""
    return _WORDS.get(name, name.replace("_", " "))


def is_unbounded(metric: str) -> bool:
    """Whether a metric has no upper bound, like a loss; other metrics lie between -1 and 1."""
    return metric.startswith(LOWER_IS_BETTER)


def counted(count: int, what: str) -> str:
    """Returns ``1 layer`` or ``6 layers``."""
    return f"{count} {what}{'s' * (count != 1)}"


def title_of(results: Results, model: object, layers: int | None, metrics: Collection[str]) -> str:
    """Returns an experiment's title, such as ``STS-B, MiniLM (6 layers)``.

    Args:
        results: Results of one of its runs.
        model: Source of its model, if known.
        layers: Number of the model's layers, if known.
        metrics: Metrics of its task in the report; the title names the metric if there are several.
    """
    package = re.match(r"package://([^/]+)", results.data or "")  # anything may be in it, whatever task it stands for
    data = results.title or (package[1].replace("-", " ") if package else in_words(results.task))
    metric = in_words(results.metric) if len(metrics) > 1 else ""
    words = ", ".join(filter(None, (data, metric, model_in_words(model))))
    return f"{words} ({counted(layers, 'layer')})" if layers else words


def model_in_words(source: object) -> str:
    """Returns a model's name without its owner; "" if unknown."""
    name = PurePosixPath(public_name(source) or "").name.replace("_", "-")
    return _KNOWN.sub(lambda match: _SPELT[match[0].lower()], name)

"""The model card of a saved model, its README.md, written from measurements alone."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from lte_lightning.files import markdown_table

README = "README.md"
PLACEHOLDER = "FOLDER"  # stands for the saved model's own place
_MARK = "<!-- lte-lightning writes this card anew with the model; take this line out to keep your own text. -->"
_VIEWS = {
    "dense": "dense, before routing",
    "soft": "all experts, weighted by their scores",
    "hard_before": "selected experts, before adaptation",
    "hard": "selected experts",
    "floor": "no expert at all, the floor",
}
_KINDS = {
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForConditionalGeneration": (None, "AutoModelForSeq2SeqLM"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
}
_GFLOP = 2**30


def write_card(folder: Path, description: dict[str, Any], config: PreTrainedConfig, name: str = PLACEHOLDER) -> None:
    """Writes the card of a saved model, unless the folder has one that somebody else wrote.

    Args:
        folder: The model's folder.
        description: The contents of its ``lte_config.json``.
        config: Its ``config.json``.
        name: The folder or repository that the model is loaded from.
    """
    if is_ours(folder / README):
        card(description, config, name).save(folder / README)


def is_ours(path: Path) -> bool:
    """Says whether a card may be written: there is none, or `write_card` wrote it and nobody has taken it over."""
    return not path.exists() or _MARK in path.read_text(errors="replace")


def card(description: dict[str, Any], config: PreTrainedConfig, name: str) -> ModelCard:
    """Returns the card; the arguments are those of `write_card`."""
    base = description.get("base") or {}
    results = description["about"].get("results") or {}
    architecture = (config.architectures or ["model"])[0]
    kind = next((kind for ending, kind in _KINDS.items() if architecture.endswith(ending)), (None, "AutoModel"))
    facts: dict[str, Any] = {}
    if results.get("hard") is not None:
        value = EvalResult(
            task_type=kind[0] or "other",
            dataset_type=str(results["task"]),
            dataset_name=str(results["task"]),
            metric_type=str(results["metric"]),
            metric_value=round(results["hard"], 6),
        )
        own = name if name != PLACEHOLDER else f"{str(base.get('model') or architecture).rpartition('/')[2]}-sparse"
        facts = {"model_name": own, "eval_results": [value]}
    data = ModelCardData(
        license=base.get("license"),
        base_model=base.get("model") if _is_repository(base.get("model")) else None,
        library_name="transformers",
        pipeline_tag=kind[0],
        tags=["lte-lightning", "activation-sparsity", "conditional-computation"],
        **facts,
    )
    parts = [
        _MARK,
        f"# {architecture}, sparse",
        f"The feed-forward networks (FFNs) of this {config.model_type} model run only the experts that a token needs. "
        "[*Learn To be Efficient*](https://arxiv.org/abs/2402.06126) selects them; lte-lightning trained it.",
        _results(results),
        _loading(description["mode"], kind[1], name),
        _recipe(description, base),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def dense_card(description: dict[str, Any], config: PreTrainedConfig) -> ModelCard:
    """Returns the card of the dense function of a saved model, exported as a plain model.

    Args:
        description: The contents of the saved model's ``lte_config.json``.
        config: Its ``config.json``.
    """
    base = description.get("base") or {}
    architecture = (config.architectures or ["model"])[0]
    kind = next((kind for ending, kind in _KINDS.items() if architecture.endswith(ending)), (None, "AutoModel"))
    data = ModelCardData(
        license=base.get("license"),
        base_model=base.get("model") if _is_repository(base.get("model")) else None,
        library_name="transformers",
        pipeline_tag=kind[0],
    )
    text = (
        f"# {architecture}, dense\n\nThe dense function of a model that lte-lightning trained to run a part of its "
        "feed-forward networks: here all of them run, so neither its sparsity nor its results hold.\n\n"
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}{_recipe(description, base)}\n")


def _results(results: dict[str, Any]) -> str:
    if not results:
        return "## Results\n\nNothing was measured when this model was saved."
    metric, sparsity = results["metric"], results.get("sparsity")
    of: dict[str, Any] = {"hard": sparsity, "hard_before": results.get("sparsity_before"), "dense": 0.0, "floor": 1.0}
    if results.get("hard") is None:
        of["hard_before"] = sparsity
    flops: dict[str, Any] = {"dense": results.get("dense_flops_per_token"), "hard": results.get("flops_per_token")}
    rows = []
    for view, label in _VIEWS.items():
        if results.get(view) is not None:
            share = "-" if of.get(view) is None else f"{100 * of[view]:.1f} %"
            cost = "-" if flops.get(view) is None else f"{flops[view] / _GFLOP:.4f}"
            rows.append([label, f"{results[view]:.4f}", share, cost])
    table = markdown_table(["FFNs compute", metric, "FFN sparsity", "GFLOPs per token"], rows)
    data = f" Data: {results['data']}." if results.get("data") else ""
    text = [f"## Results\n\nTask {results['task']}, validation rows.{data} GFLOPs are 2^30.", table.rstrip()]
    if per_layer := results.get("sparsity_per_layer"):
        shares = ", ".join(f"{100 * share:.1f}" for share in per_layer)
        text.append(f"Sparsity of each FFN, in per cent and the model's order: {shares}.")
    return "\n\n".join(text)


def _loading(mode: str, auto_class: str, name: str) -> str:
    return f"""## Load it

```python
import lte_lightning

model = lte_lightning.from_pretrained("{name}")  # sparse, in mode {mode}
```

Without lte-lightning, `{auto_class}.from_pretrained("{name}")`, `pipeline(model="{name}")` and all else that reads
Hugging Face folders compute the **dense** function of these weights: every expert runs, and nothing that is said here
about sparsity holds. After `lte_lightning.register()` both of them load the sparse model."""


def _recipe(description: dict[str, Any], base: dict[str, Any]) -> str:
    lte, about = description["lte"], description["about"]
    results = about.get("results") or {}
    versions = results.get("versions") or {}
    facts = {
        "base model": base.get("model"),
        "licence of the base model": base.get("license") or "not known",
        "selector": lte["selector"],
        "experts": f"{lte['expert_size']} neurons each, grouped by {lte['grouping']}",
        "threshold": lte["threshold"],
        "target sparsity": lte.get("target_sparsity"),
        "stage reached": about.get("stage"),
        **(about.get("recipe") or {}),
        "seed": results.get("seed"),
        "seconds per stage": ", ".join(f"{k} {v}" for k, v in (results.get("seconds_per_stage") or {}).items()) or None,
        "commit": versions.get("commit"),
        "versions": ", ".join(f"{key} {versions[key]}" for key in versions if key not in ("commit", "code")) or None,
    }
    lines = [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    return "\n".join(["## How it was made\n", "| | |", "|---|---|", *lines])


def public_name(source: object) -> str | None:
    """Returns the publishable part of an origin: the last part of a path on a disk.

    A folder ``model``, as in a run or a package, takes the name of its parent.
    """
    text = str(source or "")
    path = Path(text)
    if path.name == "model" and path.parent.name:
        return path.parent.name
    is_path = text.startswith(("/", ".", "~")) or os.path.exists(text)
    return (path.name if is_path else text) or None


def licence(path: Path) -> str | None:
    """Returns the licence in a model's card; None if the card has none."""
    try:
        text = ModelCard.load(path, ignore_metadata_errors=True).data.license
    except (OSError, ValueError):
        return None
    return text if isinstance(text, str) else None


def _is_repository(name: str | None) -> bool:
    return bool(name and re.fullmatch(r"[\w.-]+/[\w.-]+", name))

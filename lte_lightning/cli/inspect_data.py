"""Looks at data, and writes a configuration that suits them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from jinja2 import Environment, StrictUndefined
from transformers import AutoConfig

from lte_lightning.cli.cost_tables import work_out
from lte_lightning.core.model.families import FAMILIES
from lte_lightning.data import ClassificationData, InstructData, LanguageModelData
from lte_lightning.data.base import TextData
from lte_lightning.data.chats import FORMS
from lte_lightning.data.files import FORMATS, TABLES, find_files, read_split, suffix_of
from lte_lightning.data.labels import is_missing, listed
from lte_lightning.data.packaged import MODEL, DataError, resolve
from lte_lightning.errors import UserError
from lte_lightning.quiet import without_remarks

_MODELS = {
    "classification": MODEL,
    "chat": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "text": "HuggingFaceTB/SmolLM2-135M",
}
_LABELS = ("label", "labels", "class", "category", "target", "sentiment", "stars", "rating", "score", "intent", "topic")
_SIZES = (32, 16, 64, 24, 48, 8, 4)  # of experts, best first
_UNCUT = 1_000_000  # tokens, longer than any row
_SAMPLE = 1_000  # rows whose tokens are counted
_TEMPLATE = Path(__file__).with_name("init.yaml.jinja")


class _AnyData(TextData):
    """Reads splits of any kind."""

    formats = (*FORMATS, ".md")


def configuration_for(source: str, model: str | None, task: str, text: str | None, label: str | None) -> str:
    """Returns the text of a configuration for a source; the arguments are those of ``lte init``.

    Raises:
        UserError: If the data or the model cannot be used.
    """
    source = str(Path(source).resolve()) if Path(source).exists() else source
    with without_remarks("lightning.pytorch.utilities.rank_zero"):  # the task's own data make them, below
        rows = _AnyData("init", "", source, seed=0).load_splits().get("train")
    if task == "auto":
        task = _task(rows, source, text, label)
    model = model or _MODELS[task]
    limit = _limit(model, task)
    look_at = {"classification": _classification, "chat": _chat, "text": _text}[task]
    facts = look_at(source, model, limit, rows, text, label)
    size, memory = _experts(model, facts["max_length"], facts["batch_size"])
    count = facts.pop("rows")
    dense, sparse = (1, 1) if task != "classification" or count > 50_000 else (3, 2) if count >= 2_000 else (5, 3)
    epochs = {"dense": dense, "router": sparse, "expert": sparse}
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)
    about = {"task": task, "model": model, "expert_size": size, "memory": memory, "epochs": epochs, "count": count}
    return environment.from_string(_TEMPLATE.read_text()).render(about | facts)


def _task(rows: Dataset | None, source: str, text: str | None, label: str | None) -> str:
    if rows is None:  # a folder without splits: text of any files
        tables = [file for file in find_files(source) if suffix_of(file) in TABLES and file.stat().st_size]
        if tables and _task(read_split(tables[0], ""), source, text, label) != "text":
            raise DataError(
                f"{source} has no train{TABLES[0]}, or {', '.join(TABLES[1:])}; it has "
                f"{listed(file.name for file in tables)}: name that instead, or rename it; --task text reads all files "
                "as running text"
            )
        return "text"
    names = rows.column_names
    if label is None and text is None and any(form.columns[0] in names and form.columns[-1] in names for form in FORMS):
        return "chat"
    return "text" if label is None and len(names) == 1 else "classification"


def _limit(model: str, task: str) -> int:
    """Returns how many tokens a model takes, after checking that it suits the task."""
    try:
        config = AutoConfig.from_pretrained(resolve(model))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the configuration of the model {model!r}: {error}") from error
    family = FAMILIES.get(config.model_type)
    if family and task != "classification" and family.kind == "encoder":
        raise UserError(f"{model} is an encoder ({config.model_type}), which writes no text: set --model to a decoder")
    if family and task == "text" and family.kind == "encoder-decoder":
        raise UserError(f"{model} is an encoder-decoder ({config.model_type}): set --model to a decoder")
    return getattr(config, "max_position_embeddings", None) or 512


def _experts(model: str, length: int, batch_size: int) -> tuple[int, float]:
    """Returns the neurons of an expert, and the gigabytes that a fit holds at its peak."""
    refusal: UserError | None = None
    for size in _SIZES:
        try:
            costs = work_out(resolve(model), 0.0, "bf16", length, size, batch_size, "bf16-mixed")
        except UserError as error:
            refusal = refusal or error
        else:
            memory = costs["training_memory"]
            return size, sum(memory[key] for key in ("weights", "gradients", "optimizer", "activations")) / 1e9
    raise refusal or UserError(f"no expert size fits {model}")


def _classification(
    source: str, model: str, limit: int, rows: Dataset | None, text: str | None, label: str | None
) -> dict[str, Any]:
    rows = _required(rows, source)
    label = label or _label(rows, text)
    text = text or _longest(rows, label)
    data = ClassificationData(model, source, text=text, label=label, regression=True)
    with without_remarks("lightning.pytorch.utilities.rank_zero"):
        regression = label in rows.column_names and _has_fractions(data.load_splits()["train"][label][:])
    if not regression:
        data = ClassificationData(model, source, text=text, label=label)
    training = data.rows("train")[0]
    texts = training[_some(len(training))][text]
    tokens = np.array([len(ids) for ids in data.tokenizer(texts, verbose=False)["input_ids"]])
    longest = min(limit, data.tokenizer.model_max_length, 512)
    counts = Counter(training[label][:])
    classes = zip(data.classes.values, data.classes.names, strict=True) if data.classes else ()
    return {
        "source": source,
        "text": text,
        "label": label,
        "regression": regression,
        "others": [name for name in rows.column_names if name not in (text, label)],
        "classes": [(name, counts[value]) for value, name in classes],
        "is_a_row": label in counts,
        "rows": len(training),
        **_length_for(tokens, longest),
        "batch_size": 32,
    }


def _chat(
    source: str, model: str, limit: int, rows: Dataset | None, text: str | None, label: str | None
) -> dict[str, Any]:
    columns = [name for name in (text, label) if name]
    data = InstructData(model, source, columns=columns or None, max_length=_UNCUT)
    training = data.rows("train")[0]
    room = 0 if data.encoder_decoder else data.max_new_tokens  # `lightning test` and `predict` write after a prompt
    return {
        "source": source,
        "columns": list(data.form.columns),
        "written": "the chat template" if data.chat else "plain text" if data.plain_text else "Alpaca's prompt",
        "rows": len(training),
        **_length_for(np.array(data._encode(training[_some(len(training))])["length"]), min(limit, 2048), room),
        "room": room,
        "batch_size": 8,
    }


def _text(
    source: str, model: str, limit: int, rows: Dataset | None, text: str | None, label: str | None
) -> dict[str, Any]:
    text = text or (_longest(rows, None) if rows is not None else "text")
    data = LanguageModelData(model, source, subset=None, text=text, documents="auto", block_size=min(limit, 512))
    data.setup("fit")
    return {
        "source": source,
        "text": text,
        "documents": data.documents,
        "rows": len(data._ready["train"][0]),
        "tokens": data._ready["train"][0].tokens,
        "max_length": data.max_length,
        "batch_size": 4,
    }


def _required(rows: Dataset | None, source: str) -> Dataset:
    if rows is None:
        raise DataError(f"{source} has no training rows: a folder needs train.csv, or .tsv, .jsonl, .json, .parquet")
    return rows


def _label(rows: Dataset, text: str | None) -> str:
    names = [name for name in rows.column_names if name != text]
    for name in (*(n for n in names if isinstance(rows.features[n], ClassLabel)), *_LABELS):
        if near := [each for each in names if each.casefold() == name.casefold()]:
            return near[0]
    few = {}
    for name in names:
        values = rows[name][:]
        kinds = {type(value) for value in values if not is_missing(value)}
        if kinds <= {str, int, bool} and 2 <= len(set(values)) <= min(100, len(values) // 2):
            few[name] = len(set(values))
    if not few:
        only = " in the only row (JSON is a list of objects, or one object in each line)" if len(rows) == 1 else ""
        raise DataError(
            f"no column looks like class labels: set --label; there are {', '.join(rows.column_names)}{only}. For "
            "prompts and answers set --task chat, and name their columns by --text and --label. For running text set "
            "--task text"
        )
    return min(few, key=few.__getitem__)


def _longest(rows: Dataset, label: str | None) -> str:
    lengths = {}
    for name in rows.column_names:
        values = [value for value in rows[name][:_SAMPLE] if isinstance(value, str)]
        if name != label and values:
            lengths[name] = sum(map(len, values)) / len(values)
    if not lengths:
        raise DataError(f"no column holds text: set --text; there are {', '.join(rows.column_names)}")
    return max(lengths, key=lengths.__getitem__)


def _has_fractions(labels: list[Any]) -> bool:
    """Says whether labels are numbers and some of them have fractions."""
    there = [label for label in labels if not is_missing(label)]
    return all(isinstance(label, int | float) for label in there) and any(label % 1 for label in there)


def _some(rows: int) -> list[int]:
    return np.linspace(0, rows - 1, min(rows, _SAMPLE)).astype(int).tolist()


def _length_for(tokens: np.ndarray, limit: int, room: int = 0) -> dict[str, Any]:
    """Returns a length that nearly all rows and `room` more tokens fit, and a remark on the rows' lengths."""
    needed = int(-(-np.percentile(tokens, 99) // 8) * 8)
    length = min(max(needed, 16) + room, limit)
    cut = float((tokens > length).mean())
    return {"max_length": length, "median": int(np.median(tokens)), "longest": int(tokens.max()), "cut": cut}

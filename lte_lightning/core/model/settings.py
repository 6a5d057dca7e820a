"""The settings of a saved model's config.json on which its output depends, kept beside the digest of its weights."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

# Names and training, labels, generation: a change of these leaves the output of a trained model as it is, or is meant.
_OTHERS = re.compile(
    r"^_|version|dtype|dropout|pdrop|label|token_id|architectures|initializer|max_position|n_positions|vocab_size"
    r"|^output_|^(return_dict|use_cache|problem_type|task_specific_params|quantization_config|chunk_size_feed_forward)$"
)


def settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the settings as plain JSON values, those of nested mappings by dotted names."""
    return dict(_leaves(json.loads(json.dumps(config.to_dict(), default=str))))


def changed(saved: Mapping[str, Any], config: PreTrainedConfig) -> list[str]:
    """Returns which settings differ, with both values. Another version of transformers may lack or add some."""
    now = settings(config)
    return [f"{key}: {value} there, {now[key]} here" for key, value in saved.items() if now.get(key, value) != value]


def _leaves(part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in part.items():
        if _OTHERS.search(key):
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

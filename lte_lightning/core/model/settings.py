"""The settings of a saved model's config.json on which its output depends, kept beside the digest of its weights."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers import PreTrainedConfig

# Names and training, labels, generation: a change of these leaves the output of a trained model as it is, or is meant.
_OTHERS = re.compile(
    r"^_|version|dtype|dropout|pdrop|label|(bos|eos|sep|cls|mask)_token_id|architectures|initializer|n_positions"
    r"|(?<!original_)max_position|vocab_size"
    r"|^output_|^(return_dict|use_cache|problem_type|task_specific_params|quantization_config|chunk_size_feed_forward)$"
)


def settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the settings as plain JSON values, those of nested mappings by dotted names."""
    return dict(_leaves(json.loads(json.dumps(config.to_dict(), default=str))))


def changed(saved: Mapping[str, Any], config: PreTrainedConfig, version: str | None) -> list[str]:
    """Returns which settings differ, with both values.

    Args:
        saved: The settings that were saved.
        config: The configuration that was read.
        version: The version of transformers that saved them. Another version may lack settings, or add some.
    """
    now = settings(config)
    differ = [key for key, value in saved.items() if now.get(key, value) != value and not _is_added(key, value)]
    if saved and version == transformers.__version__:
        differ += [key for key in now if key not in saved]
    return [f"{key}: {saved.get(key)} there, {now[key]} here" for key in differ]


def _is_added(key: str, value: Any) -> bool:
    """Says whether a setting is one that users add to a saved model: a token for padding where there was none."""
    return key == "pad_token_id" and value is None


def _leaves(part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in part.items():
        if _OTHERS.search(key):
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

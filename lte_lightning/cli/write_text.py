"""The work of ``lte generate``: find and load a language model, let it write, and measure."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    BatchEncoding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.utils import logging as hf_logging

from lte_lightning.bench.machine import moved
from lte_lightning.core.model.checks import listed, require_finite
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.families import FAMILIES
from lte_lightning.core.model.folder import find_model, is_lte, read_description, read_lte_config
from lte_lightning.core.model.loading import from_pretrained
from lte_lightning.core.model.quantize import Quantization
from lte_lightning.core.model.quantize_plain import quantize_plain
from lte_lightning.core.routing.sparsity import Counts
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.errors import UserError, meant_path
from lte_lightning.kernels.dispatch import Backend
from lte_lightning.quiet import without_bars


@dataclass(frozen=True)
class Source:
    """A model that continues text, not loaded yet.

    Args:
        name: Its folder, or hub id.
        config: The plain model's.
        architecture: The plain model's class.
        mode: The mode that an LTE model was saved in, None for a plain model.
        quantized: int8 or int4 for a folder of quantised weights, else None.
    """

    name: str
    config: PreTrainedConfig
    architecture: type[PreTrainedModel]
    mode: str | None
    quantized: str | None = None

    @without_bars()
    def load(
        self, backend: Backend, dtype: torch.dtype | str, device: torch.device, quantize: Quantization | None = None
    ) -> PreTrainedModel:
        """Returns the model in evaluation mode, its weights rounded if that is asked for.

        Raises:
            UserError: If its files are damaged, or the device has no room for it.
        """
        try:
            if self.mode is not None:
                loaded = from_pretrained(self.name, backend=backend, quantize=quantize, dtype=dtype)
                return moved(loaded, device).eval()
            # With this option it returns a pair, unlike its signature
            both: Any = self.architecture.from_pretrained(self.name, output_loading_info=True, dtype=dtype)
            model: PreTrainedModel = both[0]
            info: dict[str, list[str]] = both[1]
            if missing := sorted(info["missing_keys"]):
                raise UserError(f"{self.name} lacks weights: {listed(missing)}; they would be random")
            require_finite(dict(model.named_parameters()), self.name)
            model = moved(model, device).eval()
            return quantize_plain(model, quantize) if quantize else model
        except UserError:
            raise
        # RuntimeError: weights of another size, or no memory; SafetensorError: a file that was cut short
        except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(f"cannot load the model {self.name}: {_first_line(error)}") from error


def find_source(folder: str) -> Source:
    """Finds a model by its folder, a run's folder, or a hub id; no weights are read.

    Raises:
        UserError: If there is no such model, or it does not continue text.
    """
    hf_logging.set_verbosity_error()
    name = find_model(folder)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).exists():
            raise UserError(f"cannot read the model configuration in {name}: {_first_line(error)}") from error
        near = meant_path(name)
        raise UserError(
            f"no folder {name}{near}, and no model of that name in the cache or on the hub ({_first_line(error)})"
        ) from error
    mode = quantized = None
    if is_lte(name):
        read_lte_config(name)  # which refuses a damaged description
        description = read_description(name)
        mode, quantized = description["mode"], description.get("quantized", {}).get("kind")
    return Source(name, config, _architecture(name, config), mode, quantized)


def _architecture(folder: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    name = (config.architectures or ["none"])[0]
    architecture: type[PreTrainedModel] | None = getattr(transformers, name, None)
    if architecture is None:
        raise UserError(f"{folder} was saved as {name!r}, which transformers lacks")
    family = FAMILIES.get(config.model_type)
    is_encoder = family is not None and family.kind == "encoder" and not getattr(config, "is_decoder", False)
    if is_encoder or not architecture.can_generate() or architecture.main_input_name != "input_ids":
        raise UserError(
            f"{folder} is a {name}, which does not generate text; name a decoder with its language model head, or an "
            "encoder-decoder"
        )
    return architecture


def encode(
    source: Source, tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, max_new_tokens: int
) -> BatchEncoding:
    """Returns a prompt's ``input_ids`` and ``attention_mask``, both [1, T].

    Args:
        source: The model that reads them.
        tokenizer: The model's tokenizer.
        prompt: The text.
        chat: Whether it is a user's message, for the tokenizer's chat template.
        max_new_tokens: Tokens to leave room for.

    Raises:
        UserError: If the prompt is empty or too long, or there is no chat template, or it refuses the prompt.
    """
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"the tokenizer of {source.name} has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        try:
            prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise UserError(f"the chat template of {source.name} refuses the prompt: {error}") from error
    encoding = tokenizer(
        prompt,
        add_special_tokens=not chat,
        return_token_type_ids=False,
        return_attention_mask=True,
        return_tensors="pt",
    )
    length = encoding["input_ids"].shape[1]
    if not length:
        raise UserError("the prompt is empty, and the tokenizer puts no token before it; give --prompt a text")
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    needed = max(length, max_new_tokens + 1) if source.config.is_encoder_decoder else length + max_new_tokens
    if limit and needed > limit:
        raise UserError(
            f"{length} tokens of the prompt and {max_new_tokens} new ones are more than {source.name} takes "
            f"({limit}, its max_position_embeddings); shorten the prompt or lower --max-new-tokens"
        )
    return encoding


class TimedStreamer(TextStreamer):
    """Prints a text while it is generated, without prompt and special tokens, and records each token's time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self.start = perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, and then token after token. They arrive on the CPU, so the device has finished them."""
        if not self.next_tokens_are_prompt:
            self.times.append(perf_counter())
        super().put(value)

    @property
    def rate(self) -> float:
        """Tokens per second after the first token, which includes the prompt; 0 without a second token."""
        return (len(self.times) - 1) / max(self.times[-1] - self.times[0], 1e-9)

    def __str__(self) -> str:
        count = f"{len(self.times)} new token{'s' * (len(self.times) != 1)}"
        rate = f", {self.rate:.1f} tokens/s" if self.rate else ""
        return f"{count}{rate}, the first after {self.times[0] - self.start:.2f} s"


def choose_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float) -> None:
    """Sets sampling at a temperature, greedy at 0; penalties and forced tokens stay the model's own."""
    own: Any = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    own.update(
        do_sample=temperature > 0,
        temperature=temperature or None,
        num_beams=1,  # a streamer takes a single text
        num_return_sequences=1,
        return_dict_in_generate=False,
        eos_token_id=sorted({tokenizer.eos_token_id, *(end for end in ends if end is not None)}),
        pad_token_id=tokenizer.pad_token_id,
    )


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: BatchEncoding, max_new_tokens: int
) -> tuple[torch.Tensor, TimedStreamer]:
    """Prints a model's continuation of a prompt, and returns its tokens, as ``generate`` does, and their times.

    Two uncounted tokens come first, because kernels are built at their first use.
    """
    generate: Any = model.generate
    generate(**{name: value_BT[:, :1] for name, value_BT in inputs.items()}, max_new_tokens=2)
    streamer = TimedStreamer(tokenizer)
    return generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer), streamer


@torch.no_grad()
def used_sparsity(model: PreTrainedModel, inputs: BatchEncoding, ids_BT: torch.Tensor) -> float:
    """Returns the FFN sparsity at the tokens that predicted a new token; for an encoder-decoder, the decoder's.

    One more pass over the whole text reads the routers, so that counting does not disturb the timing.

    Args:
        model: In hard mode.
        inputs: The prompt, ``input_ids`` and ``attention_mask``.
        ids_BT: What `write` returned for it.
    """
    fed_BT = ids_BT[:, :-1]  # the last token was made, but not read
    if model.config.is_encoder_decoder:
        mask_BT, batch = None, {**inputs, "decoder_input_ids": fed_BT}
    else:
        mask_BT = torch.ones_like(fed_BT)
        batch = {"input_ids": fed_BT, "attention_mask": mask_BT.clone()}
        mask_BT[:, : inputs["input_ids"].shape[1] - 1] = 0
    with RouterTrace(model, mask_BT) as trace:
        model.base_model(**batch)
    counts, stacks = trace.counts(), [ffn.stack for ffn in expert_ffns(model).values()]
    own = [layer for layer, stack in enumerate(stacks) if stack == max(stacks)]
    return Counts(counts.active_L[own], counts.tokens_L[own], [counts.experts[layer] for layer in own]).sparsity()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

"""Quantise a plain model. Its FFNs become experts that all run, because the kernels know no other form."""

import math
from typing import Any

from transformers import PreTrainedModel

from lte_lightning.core.model.backend import set_backend
from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert
from lte_lightning.core.model.experts import expert_ffns, set_mode
from lte_lightning.core.model.parts import count_neurons
from lte_lightning.core.model.quantize import Quantization, quantize

SIZE = 32  # neurons of an expert: as many as share a scale


def quantize_plain(model: PreTrainedModel, kind: Quantization) -> PreTrainedModel:
    """Rounds the weights of a plain model to 8 or 4 bits, in place, to decode faster on a CPU; every neuron runs.

    Its routers have one row for 32 neurons, and choose every expert for any input, so that `fused_decoding` takes the
    model.

    Args:
        model: A plain model in evaluation mode, on the CPU.
        kind: ``int8`` or ``int4``.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: If its family, or the type of a projection, is unknown.
        UserError: If `quantize` cannot take it.
    """
    lte = LteConfig(grouping="contiguous", router_margin=0.0, expert_size=math.gcd(count_neurons(model), SIZE))
    convert(model, lte, progress=False)
    set_mode(model, "hard")
    for ffn in expert_ffns(model).values():
        ffn.selector.to(model.dtype)
        router: Any = ffn.selector.linear()
        router[0].data.zero_()
        router[1].data.fill_(1.0 + math.log(ffn.threshold / (1.0 - ffn.threshold)))
    set_backend(model, "auto")
    return quantize(model, kind)

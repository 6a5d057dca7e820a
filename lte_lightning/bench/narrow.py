"""A narrower dense FFN, which needs neither routers nor kernels: the rival of a sparse model of equal active width."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert, restore
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.parts import Projection, count_neurons
from lte_lightning.core.routing.calibrate import calibrate

NARROW = "narrow"
MULTIPLE = 32  # neurons: whole groups of quantised weights, whole experts of the kernels
TOKENS = 4096  # that neurons are chosen by, as `lte fit` does


@torch.no_grad()
def narrowed(
    dense: PreTrainedModel, sparsity: float, batches: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[PreTrainedModel, float]:
    """Makes a plain model with fewer neurons in each FFN: those with the largest mean |activation|, as selector narrow.

    Args:
        dense: A plain model, which is not changed.
        sparsity: Share of the neurons to leave out, of each layer alike.
        batches: Inputs to choose by, with ``attention_mask``.

    Returns:
        The narrower model, not trained any further, and the share that was left out.
    """
    neurons = count_neurons(dense)
    keep = max(MULTIPLE, MULTIPLE * round((1.0 - sparsity) * neurons / MULTIPLE))
    left_out = 1.0 - keep / neurons
    lte = LteConfig(expert_size=1, grouping="contiguous", selector=NARROW, target_sparsity=left_out)
    model = convert(copy.deepcopy(dense), lte, progress=False).eval()
    runs = ((partial(model, **batch), (batch["attention_mask"],)) for batch in batches)
    calibrate(model, runs, TOKENS)
    for ffn in expert_ffns(model).values():
        kept_K = ffn.selector.get_buffer("chosen_E").nonzero().flatten()
        for projection in (ffn.up, ffn.gate, ffn.down):
            if projection is not None:
                _cut(projection, kept_K, outputs=projection is not ffn.down)
    restore(model)
    config: Any = model.config.get_text_config()
    for name in ("intermediate_size", "n_inner"):  # what a GGUF file's width is read from
        if hasattr(config, name):
            setattr(config, name, keep)
    return model.requires_grad_(False), left_out


def _cut(projection: Projection, kept_K: torch.Tensor, outputs: bool) -> None:
    turned = isinstance(projection, Conv1D)
    projection.weight = nn.Parameter(projection.weight.index_select(int(turned == outputs), kept_K), False)
    if outputs and projection.bias is not None:
        projection.bias = nn.Parameter(projection.bias[kept_K], False)
    sizes = ("nx", "nf") if turned else ("in_features", "out_features")
    setattr(projection, sizes[outputs], len(kept_K))

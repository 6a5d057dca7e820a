"""Put expert FFNs into their layers, and take them out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.experts import ExpertFfn, expert_ffns, require_expert_ffns
from lte_lightning.core.model.fused import put_together, take_apart
from lte_lightning.core.model.names import name_as_is, name_as_plain
from lte_lightning.core.model.parts import find_layers, get_child, set_child


def lte_config(model: nn.Module) -> LteConfig:
    """Returns how a converted model was converted."""
    return cast(LteConfig, model.lte_config)


def set_lte_config(model: nn.Module, config: LteConfig) -> None:
    """Records on the model how it was converted."""
    model.lte_config = config  # type: ignore[assignment]  # torch's stubs know only tensors and modules as attributes


@contextmanager
def plain(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Makes the model a plain Hugging Face model during a ``with`` block. The weights stay the same tensors."""
    require_expert_ffns(model)
    removed: list[tuple[nn.Module, ExpertFfn]] = []
    try:
        for layer in find_layers(model):
            removed.append((layer, remove(layer)))
        yield model
    finally:
        for layer, ffn in removed:
            insert(layer, ffn)


def insert(layer: nn.Module, ffn: ExpertFfn) -> None:
    """Puts an expert FFN into the layer whose FFN it is."""
    row = ffn.row
    ffn.train(layer.training)
    name_as_plain(layer)
    if row.fused:
        take_apart(get_child(layer, row.up), ffn.gate, ffn.up)
    if row.module:
        set_child(layer, row.module, ffn)
        return
    set_child(layer, row.up, ffn)
    set_child(layer, row.activation, nn.Identity())
    set_child(layer, row.down, _Moved(ffn))
    if row.dropout:
        set_child(layer, row.dropout, 0.0)


class _Moved(nn.Identity):
    """Takes the place of the down projection, so that code like ``init_weights`` still finds its weight."""

    def __init__(self, ffn: ExpertFfn) -> None:
        super().__init__()
        self.ffn = (ffn,)  # in a tuple, so that its weights are not registered twice

    @property
    def weight(self) -> torch.Tensor:
        """The down projection's weight."""
        return self.ffn[0].down.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The down projection's bias."""
        return self.ffn[0].down.bias


def remove(layer: nn.Module) -> ExpertFfn:
    """Takes the expert FFN out of a layer and returns it. The layer is then as it was."""
    (ffn,) = expert_ffns(layer).values()
    name_as_is(layer)
    row = ffn.row
    if row.module:
        (shell,) = ffn.shell
        shell.training = ffn.training
        set_child(layer, row.module, shell)
    else:
        set_child(layer, row.up, ffn.up)
        set_child(layer, row.activation, ffn.activation)
        set_child(layer, row.down, ffn.down)
        if row.dropout and ffn.dropout is not None:
            set_child(layer, row.dropout, ffn.dropout.p)
    if row.fused:
        put_together(get_child(layer, row.up), ffn.gate, ffn.up)
    return ffn

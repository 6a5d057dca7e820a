"""Attention of encoders on the CPU by our kernel, through transformers' registry of attention functions."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lte_lightning.core.model.exact import what_transforms
from lte_lightning.core.model.families import FAMILIES
from lte_lightning.kernels.cpu.attention import run_attention

NAME = "lte_lightning"


def use_attention(model: nn.Module, kernel: bool = True) -> None:
    """Lets our kernel compute an encoder's attention where torch's would, or undoes that.

    The kernel runs on a CPU in bfloat16 or float16, without gradients. Everything else goes to torch as before. Models
    whose attention is not ``sdpa`` (``eager`` shows its weights) are left alone.

    Args:
        model: A model of transformers. Others are left alone.
        kernel: False gives the model torch's attention again.
    """
    config: Any = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is not None and family.kind == "encoder" and config._attn_implementation == ("sdpa" if kernel else NAME):
        config._attn_implementation = NAME if kernel else "sdpa"


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention as ``sdpa`` of transformers does, and leaves to it what the kernel does not know."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if (
        (attention_mask is None and causal)
        or (attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape[1:2] != (1,)))
        or dropout
        or any(more.get(name) is not None for name in ("position_bias", "softcap", "cache"))
        or query.device.type != "cpu"
        or query.dtype not in (torch.bfloat16, torch.float16)  # torch is as fast in float32
        or not query.dtype == key.dtype == value.dtype
        or not query.shape[:2] == key.shape[:2] == value.shape[:2]
        or not query.shape[-1] == key.shape[-1] == value.shape[-1]
        or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        or torch.compiler.is_exporting()  # other engines know torch's operator only
        or what_transforms()
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **more
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return run_attention(query, key, value, attention_mask, scale), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)

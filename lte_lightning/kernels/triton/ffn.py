"""The triton backend: one operator for any number of tokens, which `torch.compile` and CUDA graphs do not split."""

import torch

from lte_lightning.kernels.layout import ExpertWeights
from lte_lightning.kernels.triton.common import check_device
from lte_lightning.kernels.triton.decode import MAX_TOKENS, run_decode
from lte_lightning.kernels.triton.prefill import run_prefill
from lte_lightning.kernels.triton.stream import run_stream


def run_triton(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Computes the selected experts' output on a GPU, without a gradient.

    Nothing on the host depends on the mask: no synchronisation, no shape, no choice of kernel. Neighbouring tokens
    share the weights that they load, and each token's result is independent of the others. The exception is NaN in an
    expert's down projection: it also reaches the neighbours of a token that selected the expert. No other backend does
    that.

    Args:
        x_ND: Input of N tokens, float32, bfloat16 or float16, with any strides.
        mask_NE: True where a token runs an expert. The weights of an expert that no token runs are not read.
        weights: The FFN's weights and biases, contiguous and of the input's type.

    Returns:
        The output [N, D] in the type of ``x_ND``, accumulated in float32.

    Raises:
        ValueError: For tensors that these kernels cannot take, by device, type, shape or strides.
    """
    _check(x_ND, mask_NE, weights)
    return _triton_ffn(
        x_ND,
        mask_NE,
        weights.up_ESD,
        weights.down_ESD,
        weights.gate_ESD,
        weights.up_bias_ES,
        weights.gate_bias_ES,
        weights.down_bias_D,
        weights.activation,
    )


def _check(x_ND: torch.Tensor, mask_NE: torch.Tensor, weights: ExpertWeights) -> None:
    E, _, D = weights.up_ESD.shape
    if x_ND.ndim != 2 or x_ND.shape[1] != D:
        raise ValueError(f"x_ND has shape {tuple(x_ND.shape)}, expected (N, {D})")
    if tuple(mask_NE.shape) != (len(x_ND), E):
        raise ValueError(f"mask_NE has shape {tuple(mask_NE.shape)}, expected {(len(x_ND), E)}")
    if mask_NE.dtype != torch.bool:
        raise ValueError(f"mask_NE is {mask_NE.dtype}, expected torch.bool: compare the scores with the threshold")
    w = weights  # by name, because older versions of torch.compile do not look into a dataclass
    parts = {
        "up_ESD": w.up_ESD, "down_ESD": w.down_ESD, "gate_ESD": w.gate_ESD, "up_bias_ES": w.up_bias_ES,
        "gate_bias_ES": w.gate_bias_ES, "down_bias_D": w.down_bias_D,
    }  # fmt: skip
    check_device(x_ND, parts)
    if mask_NE.device != x_ND.device:
        raise ValueError(f"mask_NE is on {mask_NE.device}, and x_ND on {x_ND.device}")
    for name, tensor in parts.items():
        if name.endswith("ESD") and tensor is not None and tensor.dtype != x_ND.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, and x_ND {x_ND.dtype}: convert one of the two")


@torch.library.custom_op("lte_lightning::triton_ffn", mutates_args=())
def _triton_ffn(
    x_ND: torch.Tensor,
    mask_NE: torch.Tensor,
    up_ESD: torch.Tensor,
    down_ESD: torch.Tensor,
    gate_ESD: torch.Tensor | None,
    up_bias_ES: torch.Tensor | None,
    gate_bias_ES: torch.Tensor | None,
    down_bias_D: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    weights = ExpertWeights(up_ESD, down_ESD, activation, gate_ESD, up_bias_ES, gate_bias_ES, down_bias_D)
    x_ND = x_ND.contiguous()
    if x_ND.numel() == 0:
        return torch.empty_like(x_ND)
    with torch.cuda.device_of(x_ND):
        run = run_stream if len(x_ND) == 1 else run_decode if len(x_ND) <= MAX_TOKENS else run_prefill
        return run(x_ND, mask_NE.contiguous().view(torch.uint8), weights)


@_triton_ffn.register_fake
def _(
    x_ND: torch.Tensor,
    mask_NE: torch.Tensor,
    up_ESD: torch.Tensor,
    down_ESD: torch.Tensor,
    gate_ESD: torch.Tensor | None,
    up_bias_ES: torch.Tensor | None,
    gate_bias_ES: torch.Tensor | None,
    down_bias_D: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    return torch.empty_like(x_ND, memory_format=torch.contiguous_format)

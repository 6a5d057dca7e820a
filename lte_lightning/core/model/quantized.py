"""The modules of a quantised model, which hold blocks of 8 or 4 bits where a Linear holds its weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lte_lightning.errors import UserError
from lte_lightning.kernels.cpu.pages import pack, room
from lte_lightning.kernels.cpu.quantized import run_quantized_linear
from lte_lightning.kernels.quantized import Quantized, Shape, dequantize


class QuantizedLinear(nn.Module):
    """A linear layer for evaluation with a weight of 8 or 4 bits. It rounds its input to 8 bits in groups of 32.

    It has no ``weight``. Read ``dequantized()`` instead.

    Args:
        matrix: The weight.
        bias_R: The bias.
    """

    blocks: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, matrix: Quantized, bias_R: torch.Tensor | None = None) -> None:
        super().__init__()
        self.shape = matrix.shape
        self.in_features, self.out_features = matrix.shape.inputs, matrix.shape.outputs
        self.register_buffer("blocks", matrix.blocks)
        self.register_buffer("scale", matrix.scale)
        self.register_buffer("bias", None if bias_R is None else bias_R.detach())

    @property
    def matrix(self) -> Quantized:
        """The weight."""
        return Quantized(self.blocks, self.scale, self.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the output, in the type of the input."""
        self.require_evaluation(x)
        return run_quantized_linear(x, self.matrix, self.bias)

    def require_evaluation(self, x: torch.Tensor) -> None:
        """Refuses to train, and devices that the kernels do not run on.

        Raises:
            UserError: If the module is in train mode, a gradient is needed, or the input is on another device.
        """
        if self.training or (x.requires_grad and torch.is_grad_enabled()):
            raise UserError(
                "a quantised model cannot be trained: its weights have no gradients. Train the model as it was, and "
                "quantize() what came of it; for evaluation call model.eval(), and no input may require a gradient"
            )
        if x.device.type not in ("cpu", "meta"):
            raise UserError(f"quantised weights are computed on a CPU only, and the input is on {x.device}")

    def dequantized(self) -> torch.Tensor:
        """Returns the weight that the blocks stand for, [out, in] in float32."""
        return dequantize(self.matrix)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantizedLinear":
        dtype = self.scale.dtype  # the kernels' type; the model's type is for inputs and biases
        super()._apply(fn, recurse)
        self.scale = self.scale.to(dtype)
        return self

    def extra_repr(self) -> str:
        """Describes the weight in ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, bits={self.matrix.bits}, bias={self.bias is not None}"


class QuantizedEmbedding(nn.Module):
    """An embedding that is tied to a quantised head, and looks up the head's rows.

    Args:
        head: The head; it holds the weight.
        embedding: The embedding that this module replaces.
    """

    def __init__(self, head: QuantizedLinear, embedding: nn.Embedding) -> None:
        super().__init__()
        self.head = (head,)  # in a tuple, so that its weights are not registered twice
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self.padding_idx = embedding.padding_idx
        # This moves and changes its type with the model, and so tells the type of the rows.
        self.register_buffer("like", torch.empty(0, dtype=embedding.weight.dtype), persistent=False)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Returns the rows, [B, T, D]."""
        (head,) = self.head
        like: Any = self.like
        rows_ND = dequantize(head.matrix, ids_BT.flatten())
        return rows_ND.to(like.dtype).view(*ids_BT.shape, -1)

    def extra_repr(self) -> str:
        """Describes the embedding in ``print(model)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.head[0].matrix.bits}, tied"


def is_quantized(model: nn.Module) -> bool:
    """Says whether a model is quantised."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


@torch.no_grad()
def pack_weights(model: nn.Module) -> None:
    """Moves the weights of a quantised model into one piece of memory with large pages, in the order of its modules."""
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    places = [(linear, name) for linear in linears for name in ("blocks", "scale")]
    size = sum(room(getattr(linear, name)) for linear, name in places)
    packed = pack((getattr(linear, name) for linear, name in places), size)
    for (linear, name), tensor in zip(places, packed, strict=True):
        setattr(linear, name, tensor)


def stored_linear(name: str, shape: Shape, tensors: dict[str, torch.Tensor]) -> QuantizedLinear:
    """Makes a linear layer from stored tensors.

    Args:
        name: The layer's name, for messages.
        shape: The weight's size and parts.
        tensors: ``blocks``, ``scale``, and ``bias`` if it has one.

    Raises:
        ValueError: If the tensors do not fit the shape.
    """
    if lacking := [key for key in ("blocks", "scale") if key not in tensors]:
        raise ValueError(f"{name} lacks its {' and '.join(lacking)}")
    steps = 4 if tensors["blocks"].shape[3:4] == (4,) else 8
    expected = {
        "blocks": ((*shape.blocks, steps, 16, 4), torch.uint8),
        "scale": ((*shape.blocks, 16), torch.bfloat16),
    }
    if "bias" in tensors:
        expected["bias"] = ((shape.outputs,), tensors["bias"].dtype)
    for key, (sizes, dtype) in expected.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != sizes or tensor.dtype != dtype:
            raise ValueError(f"{name}.{key} is {tensor.dtype} {list(tensor.shape)} instead of {dtype} {list(sizes)}")
    return QuantizedLinear(Quantized(tensors["blocks"], tensors["scale"], shape), tensors.get("bias"))

"""Predict an FFN's time on a GPU from its bytes and products, for comparison with measured times.

A prediction is a lower bound. It ignores launches (the triton backend makes three for a decoded token, router included)
and assumes that a kernel reaches the full bandwidth. Always report a predicted time with the word "predicted".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU as its vendor documents them, without structured weight sparsity.

    Args:
        bandwidth: Bytes per second of the memory.
        flops_16: FLOPs per second of matrix products in bfloat16 or float16, two per multiply-add.
        flops_32: The same in float32, not TF32.
        name: How people call it.
    """

    bandwidth: float
    flops_16: float
    flops_32: float
    name: str = "GPU"


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(1.008e12, 80e12, 40e12, "RTX 3090 Ti"),
        Gpu(2.039e12, 312e12, 19.5e12, "A100 SXM 80 GB"),
        Gpu(3.35e12, 989e12, 67e12, "H100 SXM"),
        Gpu(4.8e12, 989e12, 67e12, "H200 SXM"),
        Gpu(8.0e12, 2250e12, 80e12, "B200 SXM"),
        Gpu(5.3e12, 1307e12, 163e12, "MI300X"),
    )
}


@dataclass(frozen=True)
class Prediction:
    """Predicted milliseconds of one FFN. Each is the longer of its bytes at full bandwidth and its products at peak.

    Args:
        dense_ms: The dense FFN.
        ffn_ms: The experts that at least one token runs.
        router_ms: The router.
    """

    dense_ms: float
    ffn_ms: float
    router_ms: float

    @property
    def ratio(self) -> float:
        """Time of the dense FFN divided by that of the experts and the router."""
        return self.dense_ms / (self.ffn_ms + self.router_ms)

    def __str__(self) -> str:
        return (
            f"predicted: dense {self.dense_ms:.4f} ms, experts {self.ffn_ms:.4f} ms + router {self.router_ms:.4f} ms, "
            f"{self.ratio:.2f}x"
        )


def predict(
    gpu: Gpu,
    width: int,
    neurons: int,
    expert_size: int,
    gated: bool,
    bytes_per_weight: int,
    tokens: int = 1,
    sparsity: float = 0.0,
    union_sparsity: float | None = None,
) -> Prediction:
    """Predicts the time of one FFN from bytes and products.

    The prediction counts weights, inputs and outputs once. It assumes that data which kernels pass to each other stay
    in the cache.

    Args:
        gpu: A row of `GPUS`, or your own values.
        width: D.
        neurons: F.
        expert_size: S.
        gated: Whether there is a gate projection.
        bytes_per_weight: 2 or 4.
        tokens: N.
        sparsity: Share of neurons that a token does not run, 0 to 1.
        union_sparsity: Share of neurons that no token runs. The default is the share for independent masks.

    Raises:
        ValueError: For a share outside 0 to 1 or an unknown size of weights.
    """
    if union_sparsity is None:
        union_sparsity = sparsity**tokens
    if not 0 <= union_sparsity <= sparsity <= 1:
        raise ValueError(
            f"sparsity {sparsity} and union sparsity {union_sparsity}: expected 0 <= union <= sparsity <= 1"
        )
    if bytes_per_weight not in (2, 4):
        raise ValueError(f"bytes_per_weight is {bytes_per_weight}, expected 2 or 4")

    def ms(weights_read: float, products: float, outputs: int) -> float:
        moved = bytes_per_weight * (weights_read + tokens * (width + outputs))
        peak = gpu.flops_16 if bytes_per_weight == 2 else gpu.flops_32
        return 1e3 * max(moved / gpu.bandwidth, 2 * products / peak)

    weights = (3 if gated else 2) * width * neurons
    router = width * neurons // expert_size
    return Prediction(
        dense_ms=ms(weights, tokens * weights, width),
        ffn_ms=ms((1 - union_sparsity) * weights, (1 - sparsity) * tokens * weights, width),
        router_ms=ms(router, tokens * router, neurons // expert_size),
    )

from collections.abc import Callable

import pytest
import torch

from lte_lightning.kernels.layout import ExpertWeights

# Between a backend and the oracle, relative to 1 + |oracle|: rounding of the type, of the hidden activations and sums.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(scope="session")
def make_weights() -> Callable[..., ExpertWeights]:
    """`make_weights(E, S, D, activation, gated, biases, dtype)`: random, and scaled so that outputs are around 1."""

    def make(
        E: int,
        S: int,
        D: int,
        activation: str = "silu",
        gated: bool = False,
        biases: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> ExpertWeights:
        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape) * scale).to(dtype)

        return ExpertWeights(
            normal(E, S, D, scale=D**-0.5),
            normal(E, S, D, scale=(E * S) ** -0.5),
            activation,
            normal(E, S, D, scale=D**-0.5) if gated else None,
            normal(E, S) if biases else None,
            normal(E, S) if gated and biases else None,
            normal(D) if biases else None,
        )

    return make


@pytest.fixture(scope="session")
def assert_agrees() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """`assert_agrees(actual, expected)`: as closely as the type allows."""

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        tolerance = TOLERANCES[expected.dtype]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    return check

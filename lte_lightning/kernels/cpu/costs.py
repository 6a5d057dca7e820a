"""What each way to compute an FFN costs on this machine: measured at its first use, then kept in the user's cache."""

import ctypes
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lte_lightning.cache import cache_folder, content_digest
from lte_lightning.errors import UserError
from lte_lightning.files import hold_folder, read_json, write_json
from lte_lightning.kernels.cpu.processor import processor
from lte_lightning.kernels.layout import ExpertWeights

EXPERTS, NEURONS, WIDTH = 32, 32, 1024  # of an FFN that is measured
LAYERS = {4: 6, 2: 12}  # by bytes of a weight: together they exceed most caches, as the layers of a model do
ROUNDS = 5
TOKENS = {"few": (4, 16), "many": (16, 64), "dense": (16, 64)}
KEPT = 32  # machines of one cache, which a cluster may share

logger = logging.getLogger("lte_lightning")
# Computes an FFN: the way, the input [N, D], the mask [N, E], the weights.
Compute = Callable[[str, torch.Tensor, torch.Tensor, ExpertWeights], torch.Tensor]


class Costs(NamedTuple):
    """Nanoseconds per weight of an expert: a cost for the expert, and a cost for each token that runs it.

    The dense way computes all experts for all tokens.
    """

    few: tuple[float, float]
    many: tuple[float, float]
    dense: tuple[float, float]

    def fastest(self, mask_NE: torch.Tensor) -> str:
        """Returns the field's name whose way is expected to be the fastest for a mask.

        It is never "dense" if no token needs some expert, because the weights of such an expert must not be read.
        """
        counts = mask_NE.sum(dim=0).tolist()
        running = sum(1 for count in counts if count) or 1
        each = sum(counts) / running
        times = {"few": self.few[0] + self.few[1] * each, "many": self.many[0] + self.many[1] * each}
        if running == len(counts):
            times["dense"] = self.dense[0] + self.dense[1] * len(mask_NE)
        return min(times, key=times.__getitem__)


def costs(lib: ctypes.CDLL, dtype: torch.dtype, compute: Compute) -> Costs | None:
    """Returns the costs on this machine with torch's number of threads.

    They are measured once, which takes a fraction of a second for a type. Every later process reads them, so that equal
    inputs take the same way and give equal bits. Where nothing can be kept, the answer is therefore None.

    Args:
        lib: The compiled kernels.
        dtype: Type of input and weights.
        compute: Computes an FFN in one of the ways.
    """
    return _costs(lib._name, torch.get_num_threads(), dtype, compute)


@cache
def _costs(library_path: str, threads: int, dtype: torch.dtype, compute: Compute) -> Costs | None:
    folder = cache_folder()
    if folder is None:
        return None
    kept, name = folder / "cpu_costs.json", str(dtype).removeprefix("torch.")
    library = Path(library_path).name
    machine = content_digest(repr((processor(), torch.__version__, library, threads)).encode())
    if (known := _read(kept).get(machine, {}).get(name)) is not None:
        return known
    with hold_folder(folder, seconds=60) as held:
        everything = _read(kept)
        if (known := everything.get(machine, {}).get(name)) is not None:  # another process was faster
            return known
        if not held:
            return None
        measured = measure(dtype, compute)
        everything[machine] = everything.pop(machine, {}) | {name: measured}
        latest = dict(list(everything.items())[-KEPT:])
        try:
            write_json(kept, latest)
        except UserError as error:
            logger.warning(f"which way is faster is not measured, because the result cannot be kept: {error}")
            return None
    return measured


def _read(path: Path) -> dict[str, dict[str, Costs]]:
    """Returns what an earlier process kept, by machine and type; nothing if the file is missing or damaged."""
    with suppress(UserError, OSError, TypeError, ValueError, AttributeError):
        machines: dict[str, Any] = read_json(path)
        return {key: {name: _checked(found) for name, found in types.items()} for key, types in machines.items()}
    return {}


def _checked(lines: list[list[float]]) -> Costs:
    pairs = [(float(expert), float(token)) for expert, token in lines]
    if not all(0 <= number < float("inf") for pair in pairs for number in pair):
        raise ValueError(pairs)
    return Costs(*pairs)


def measure(dtype: torch.dtype, compute: Compute) -> Costs:
    """Measures each way for two numbers of tokens, in turn, and keeps each one's shortest time."""
    random = torch.Generator().manual_seed(0)
    rows = torch.rand(EXPERTS, NEURONS, WIDTH, generator=random, device="cpu", dtype=torch.float32).sub_(0.5).to(dtype)
    layers = cycle(
        [ExpertWeights(rows.clone(), rows.clone(), "silu", rows.clone()) for _ in range(LAYERS[rows.element_size()])]
    )
    shortest = {(way, tokens): float("inf") for way, both in TOKENS.items() for tokens in both}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for way, tokens in shortest:
                x_ND = rows.flatten(0, 1)[:tokens]
                mask_NE = torch.ones(tokens, EXPERTS, dtype=torch.bool, device="cpu")
                weights = next(layers)
                begin = time.perf_counter_ns()
                compute(way, x_ND, mask_NE, weights)
                shortest[way, tokens] = min(shortest[way, tokens], time.perf_counter_ns() - begin)
    weights_of_all = 3 * rows.numel()

    def line(way: str) -> tuple[float, float]:
        (few, many), (short, long) = TOKENS[way], (shortest[way, tokens] / weights_of_all for tokens in TOKENS[way])
        token = max(long - short, 0.0) / (many - few)
        return max(short - token * few, 0.0), token

    return Costs(line("few"), line("many"), line("dense"))

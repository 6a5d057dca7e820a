"""Interleaved timings of one subject, and the rows made of them."""

import copy
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from lte_lightning.bench.machine import Clock, clock_on
from lte_lightning.bench.rivals import GATHERING, Rival, with_dense_down
from lte_lightning.bench.subject import Subject, dense_blocks
from lte_lightning.bench.timing_row import Timing
from lte_lightning.core.model.backend import set_backend
from lte_lightning.core.model.experts import ExpertFfn
from lte_lightning.core.model.parts import Projection, find_layers
from lte_lightning.errors import UserError
from lte_lightning.kernels.cpu.build import library
from lte_lightning.kernels.dispatch import autocast_dtype
from lte_lightning.kernels.layout import ExpertWeights

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
CONTEXT = 32  # tokens in the cache of a decoding model


Samples = dict[Any, list[float]]


def interleave(arms: dict[Any, Callable[[], Sequence[float]]], repeats: int, seed: int = 0) -> Samples:
    """Runs every arm once per round, in a new random order, so that all see the same disturbances.

    Args:
        arms: Each runs one pass and returns its timings.
        repeats: Measured rounds, after one warm-up round.
        seed: Seed of the orders.
    """
    order, generator = list(arms), random.Random(seed)
    samples: Samples = {name: [] for name in arms}
    for i in range(repeats + 1):
        generator.shuffle(order)
        for name in order:
            times = arms[name]()
            if i:
                samples[name] += times
    return samples


Timer = Callable[[Sequence[Callable[[], object]]], list[float]]


def timed(calls: Sequence[Callable[[], object]], clock: Clock = time.perf_counter) -> list[float]:
    """Returns the milliseconds that each call took."""
    times = []
    for call in calls:
        start = clock()
        call()
        times.append(1e3 * (clock() - start))
    return times


@torch.inference_mode()
def measure(
    subject: Subject,
    scope: str,
    batch: int,
    length: int,
    sparsities: Sequence[float],
    repeats: int,
    rivals: dict[str, Rival] | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[list[Timing], Samples]:
    """Measures one subject at some sparsities.

    Args:
        subject: What to measure.
        scope: ``ffn`` or ``model``.
        batch: Sequences.
        length: Tokens of each; 1 decodes if the model is a decoder. In an encoder-decoder, both stacks read them.
        sparsities: Shares of experts that a token skips.
        repeats: Rounds.
        rivals: Alternatives to measure as well, in scope ``ffn``.
        clock: One of `machine.CLOCKS`; it waits for the device.

    Returns:
        The rows, and all timings by "dense", "router" and (sparsity, backend).

    Raises:
        UserError: If the rivals cannot run on these weights, or the model has too few positions.
    """
    timer: Timer = partial(timed, clock=clock_on(subject.device, clock))
    generator = torch.Generator().manual_seed(0)
    phase = "decode" if length == 1 and subject.is_decoder else "prefill"
    if scope == "ffn":
        arms = _block_arms(subject, batch, length, timer)
    else:
        arms = _model_arms(subject, batch, length, phase, timer)
    backend = backend_name(subject, batch, length)
    pools: dict[float, list[list[torch.Tensor]]] = {}
    for sparsity in sparsities:
        subject.force(batch, length, sparsity, generator)
        pools[sparsity] = [forced.pool for forced in subject.forced]

    def at(sparsity: float, run: Callable[[], Sequence[float]]) -> Callable[[], Sequence[float]]:
        def arm() -> Sequence[float]:
            for forced, pool in zip(subject.forced, pools[sparsity], strict=True):
                forced.pool = pool
            return run()

        return arm

    tried = _rival_arms(subject, batch, length, rivals, timer) if rivals else {}
    todo: dict[Any, Callable[[], Sequence[float]]] = {
        "dense": arms["dense"],
        "router": at(sparsities[0], arms["router"]),
    }
    for sparsity in sparsities:
        todo[sparsity, backend] = at(sparsity, arms["sparse"])
        for name, run in tried.items():
            todo[sparsity, name] = at(sparsity, run)
    samples = interleave(todo, repeats)
    dense_ms, router_ms = (statistics.median(samples[key]) for key in ("dense", "router"))
    timings = []
    for key, times in samples.items():
        if not isinstance(key, tuple):
            continue
        sparsity, name = key
        ms, best = statistics.median(times), bound(subject, scope, phase, batch * length, sparsity)
        ratio = dense_ms / ms
        timings.append(
            Timing(
                subject.name,
                scope,
                phase,
                NAMES[subject.dense.dtype] if autocast_dtype(subject.ffns[0].up.weight) is None else "mixed",
                batch * length,
                sparsity,
                name,
                torch.get_num_threads(),
                dense_ms,
                ms,
                ratio,
                router_ms,
                best,
                ratio / best,
                os.getloadavg()[0],
            )
        )
    return timings, samples


def backend_name(subject: Subject, batch: int, length: int) -> str:
    """Returns the name of the backend that will compute the sparse twin's FFNs, a fallback included."""
    ffn = subject.ffns[0]
    x_BTD = torch.empty(batch, length, ffn.width, dtype=subject.dense.dtype, device=subject.device)
    name = ffn.prepare(x_BTD).choice.backend
    return "cpu-views" if name == "cpu" and library() is None else name


def _input(subject: Subject, batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, subject.ffns[0].width).to(subject.device, subject.dense.dtype)


def _block_arms(subject: Subject, batch: int, length: int, timed: Timer) -> dict[str, Callable[[], list[float]]]:
    blocks, ffns, x_BTD = list(dense_blocks(subject)), subject.ffns, _input(subject, batch, length)
    return {
        "dense": lambda: timed([partial(block, x_BTD) for block in blocks]),
        "sparse": lambda: timed([partial(ffn, x_BTD) for ffn in ffns]),
        "router": lambda: timed([partial(_select, ffn, x_BTD) for ffn in ffns]),
    }


def _select(ffn: ExpertFfn, x_BTD: torch.Tensor) -> torch.Tensor:
    mask_BTE: torch.Tensor = ffn.selector(x_BTD) > ffn.threshold
    return mask_BTE


def _rival_arms(
    subject: Subject, batch: int, length: int, rivals: dict[str, Rival], timed: Timer
) -> dict[str, Callable[[], list[float]]]:
    ffns, x_BTD = subject.ffns, _input(subject, batch, length)
    by_neuron = _by_expert(subject, x_BTD)
    as_linear = [with_dense_down(weights) for weights in by_neuron]

    def call(rival: Rival, i: int, weights: ExpertWeights) -> torch.Tensor:
        mask_BTE = ffns[i].selector(x_BTD) > ffns[i].threshold
        return rival(x_BTD.flatten(0, 1), mask_BTE.flatten(0, 1), weights)

    def arm(name: str, rival: Rival) -> Callable[[], list[float]]:
        weights = by_neuron if name in GATHERING else as_linear
        return lambda: timed([partial(call, rival, i, taken) for i, taken in enumerate(weights)])

    return {name: arm(name, rival) for name, rival in rivals.items()}


@torch.inference_mode(False)  # inference mode forbids changing the storage of weights
def _by_expert(subject: Subject, x_BTD: torch.Tensor) -> list[ExpertWeights]:
    """Returns the weights by expert: the FFNs' own, or those of a copy if the FFNs keep another layout."""
    weights = []
    for ffn in subject.ffns:
        taken = copy.deepcopy(ffn) if ffn.backend == "dense-mask" else copy.copy(ffn)
        set_backend(taken, "reference")
        prepared = taken.prepare(x_BTD)
        if not isinstance(prepared.weights, ExpertWeights):
            why = prepared.choice.fallback or "weights are quantised"
            raise UserError(f"--rivals need weights stored by expert, but {why}; leave --rivals out")
        weights.append(prepared.weights)
    return weights


def _model_arms(
    subject: Subject, batch: int, length: int, phase: str, timed: Timer
) -> dict[str, Callable[[], list[float]]]:
    needed = length + (CONTEXT if phase == "decode" else 0)
    if needed > subject.longest:
        raise UserError(f"{subject.name} has positions for {subject.longest} tokens, and this run needs {needed}")
    V = subject.dense.config.get_text_config().vocab_size  # the upper half holds no special tokens
    ids_BT, prompt_BT = (torch.randint(V // 2, V, (batch, n)).to(subject.device) for n in (length, CONTEXT))
    routers = _block_arms(subject, batch, length, timed)["router"]

    def arm(model: Any) -> Callable[[], list[float]]:
        if subject.dense.config.is_encoder_decoder:
            return lambda: timed([lambda: model(ids_BT, decoder_input_ids=ids_BT)])
        if phase == "prefill":
            return lambda: timed([lambda: model(ids_BT)])
        cache = DynamicCache()

        def one_token() -> list[float]:
            if cache.get_seq_length() == 0:
                model(prompt_BT, past_key_values=cache, use_cache=True)
            times = timed([lambda: model(ids_BT, past_key_values=cache, use_cache=True)])
            cache.crop(-1)  # drop the new token, so that every call sees the same context
            return times

        return one_token

    # the prompt runs in dense mode: the prepared masks are for a single token each
    sparse = arm(subject.sparse)
    if phase == "decode":
        for ffn in subject.ffns:
            ffn.mode = "dense"
        sparse()
        for ffn in subject.ffns:
            ffn.mode = "hard"
    return {"dense": arm(subject.dense), "sparse": sparse, "router": lambda: [sum(routers())]}


def bound(subject: Subject, scope: str, phase: str, tokens: int, sparsity: float) -> float:
    """Returns the best possible ratio, see `Timing`; weights outside of FFNs count in scope ``model``."""
    ffn = subject.ffns[0]
    block = ffn.flops_dense() / 2
    router = sum(p.numel() for p in ffn.selector.parameters() if p.dim() == 2)
    active = round((1.0 - sparsity) * ffn.experts) / ffn.experts
    runs = 1.0 - (1.0 - active) ** tokens if phase == "decode" else active
    rest = 0.0
    if scope == "model":
        modules = [module for layer in find_layers(subject.dense) for module in layer.modules()]
        rest = sum(m.weight.numel() for m in modules if isinstance(m, Projection)) / subject.layers - block
    return (rest + block) / (rest + router + runs * block)

"""Times CUDA graphs by the device's clock."""

import statistics
from collections.abc import Callable

import torch

WARM_UP = 3


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Compiles and warms up on a separate stream, then captures."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def elapsed_ms(call: Callable[[], object]) -> float:
    """Returns the milliseconds of one call, by the GPU's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median_ms(call: Callable[[], object], rounds: int = 20) -> float:
    """Returns the median of some rounds, after a warm-up."""
    for _ in range(WARM_UP):
        call()
    return statistics.median(elapsed_ms(call) for _ in range(rounds))

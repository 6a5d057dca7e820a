"""Memory of large pages for weights that are read whole for every token."""

import ctypes
import sys
from collections.abc import Iterable, Iterator

import torch

HUGE = 2 << 20  # bytes of a large page
MADV_HUGEPAGE = 14
LINE = 64


def pack(tensors: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Yields copies of tensors that lie one behind the other in memory for which large pages are asked.

    The processor looks up an address per page: two cores of Zen 4 read 28 GB/s from pages of 4 KB, 53 from those of
    2 MB. If the caller drops each tensor for its copy, no memory is needed twice.

    Args:
        tensors: Contiguous ones, on the CPU.
        size: The sum of `room` over them.
    """
    held = torch.empty(size + HUGE, dtype=torch.uint8)
    at = -held.data_ptr() % HUGE
    if sys.platform == "linux":  # elsewhere, or where the system refuses, pages are as they are
        ctypes.CDLL(None).madvise(ctypes.c_void_p(held.data_ptr() + at), ctypes.c_size_t(size), MADV_HUGEPAGE)
    for tensor in tensors:
        yield held[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        at += room(tensor)


def room(tensor: torch.Tensor) -> int:
    """Returns the bytes that a tensor takes there: whole cache lines."""
    return -(-tensor.nbytes // LINE) * LINE

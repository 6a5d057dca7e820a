"""A digest of stored tensors, which ties a saved model's routers to the weights that they were trained with.

Each tensor has its own entry: type, hash, and a few of its values. An entry describes the stored values, so neither the
cut into files nor the type of the loaded model matters. If another tool wrote a folder again in another type, the
values are compared to the precision of the coarser type. For a large tensor the hash covers blocks of 1 MiB in all,
which takes half a second for a model of seven billion weights. An entry tells models apart, but does not stop a forger.
"""

import hashlib
from collections.abc import Mapping

import torch

FORMAT = 1
_BLOCKS, _BLOCK_BYTES = 16, 2**16
_VALUES = 4


def digest(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns an entry for each tensor: its type, 16 hexadecimal digits, and values from evenly spread places."""
    return {name: _entry(tensors[name]) for name in sorted(tensors)}


def differing(entries: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns the names of tensors that differ from their entry; tensors without an entry are skipped."""
    return [name for name in sorted(tensors) if name in entries and not _is_of(entries[name], tensors[name])]


def _is_of(entry: str, tensor: torch.Tensor) -> bool:
    if entry == _entry(tensor):
        return True
    type_name, _, *values = entry.split()
    recorded = getattr(torch, type_name, None)
    if not isinstance(recorded, torch.dtype) or recorded == tensor.dtype:
        return False
    if not (recorded.is_floating_point and tensor.dtype.is_floating_point):
        return False
    coarser = max((torch.finfo(recorded), torch.finfo(tensor.dtype)), key=lambda info: info.eps)
    digests = _spread(tensor)
    if len(digests) != len(values):
        return False
    pairs = zip(digests, map(float, values), strict=True)
    precision = max(coarser.eps, 1e-6)  # an entry's values have seven digits
    return all(abs(each - other) <= precision * (abs(other) + coarser.smallest_normal) for each, other in pairs)


def _entry(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    flat = tensor.detach().reshape(-1)
    step = _BLOCK_BYTES // flat.element_size()
    if len(flat) <= _BLOCKS * step:
        starts, step = [0], len(flat)
    else:
        starts = [i * (len(flat) - step) // (_BLOCKS - 1) for i in range(_BLOCKS)]
    for start in starts:
        digest.update(flat[start : start + step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    values = " ".join(f"{value:.7g}" for value in _spread(tensor))
    return f"{str(tensor.dtype).removeprefix('torch.')} {digest.hexdigest()[:16]} {values}".rstrip()


def _spread(tensor: torch.Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    places = [(2 * i + 1) * len(flat) // (2 * _VALUES) for i in range(_VALUES)]
    return [float(flat[place]) for place in dict.fromkeys(places)] if len(flat) else []

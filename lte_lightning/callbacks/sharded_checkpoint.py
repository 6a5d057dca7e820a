"""Checkpoints as folders: every process writes its part of the weights and of what optimizers know.

``meta.pt`` has all that is no tensor of a state dict. The rest is torch's distributed checkpoint, of tensors alone,
under flat names. Read whole, a folder gives what an ordinary checkpoint of one file holds.
"""

import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import Replicate, Shard, empty

from lte_lightning.core.model.exact import is_part
from lte_lightning.errors import UserError
from lte_lightning.files import SHARDED, exchange, sync_all

T = TypeVar("T")
META, INDEX = SHARDED
_PARTS = "parts"  # in the first: along which dimension a tensor was shared out
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = {
    *((_MODULES[0], name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "MetadataIndex")),
    *((_MODULES[0], name) for name in ("ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    (_MODULES[1], "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


def write_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint whose tensors may be parts; every process must call this.

    The folder takes its name only once all of it is on the disk. The one before stays until then.

    Args:
        checkpoint: As Lightning dumps it, of this process.
        path: The folder.

    Raises:
        UserError: If a process cannot write; in every process.
    """
    staging, first = path.with_name(f"{path.name}.tmp"), distributed.get_rank() == 0
    tensors, rest = _taken_apart(checkpoint)

    def prepare() -> None:
        _remove(staging)
        _remove(staging.with_name(f"{staging.name}.old"))
        staging.mkdir(parents=True)

    def finish() -> None:
        torch.save(rest, staging / META)
        sync_all(staging)
        if path.is_file():
            path.unlink()  # an ordinary checkpoint that the fit was resumed from
        exchange(staging, path)
        _remove(staging)

    try:
        _agreed(prepare, first)
        _agreed(lambda: dcp.save(tensors, storage_writer=dcp.FileSystemWriter(staging, sync_files=True)))
        _agreed(finish, first)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
        before = "; the one before it is kept" if path.exists() else ""
        raise UserError(f"cannot write the checkpoint {path}: {_why(error)}{before}") from error


def _agreed(step: Callable[[], T], mine: bool = True) -> T | None:
    """Runs a step and waits for the other processes; if it failed in one, all raise.

    Otherwise they would wait in their next step for the one that failed, for ever.

    Args:
        step: What to do.
        mine: Whether this process does it.

    Raises:
        RuntimeError: If it failed in another process. What fails in this one is raised as it is.
    """
    result, failed, why = None, None, ""
    try:
        if mine:
            result = step()
    except (Exception, dcp.CheckpointException) as error:
        failed, why = error, _why(error)
    whys: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(whys, why)
    if failed is not None:
        raise failed
    if any(whys):
        raise RuntimeError(next(filter(None, whys)))
    return result


def _why(error: BaseException) -> str:
    lines = f"{getattr(error, 'strerror', None) or error}".strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def read_folder(path: Path, mesh: Any = None) -> dict[str, Any]:
    """Reads a checkpoint folder, which may come from anybody, written by any number of processes.

    Args:
        path: The folder.
        mesh: The devices that its tensors are shared out over, each process reading its part; None for whole tensors.

    Returns:
        The checkpoint as Lightning dumps it.

    Raises:
        UserError: If it is damaged, or holds what no checkpoint of ours does; in every process, if in one.
    """

    def describe() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        rest = torch.load(path / META, weights_only=True, map_location="cpu")
        parts, index = rest.pop(_PARTS), _Reader(path).read_metadata()
        return rest, {key: _room(about, parts.get(key), mesh) for key, about in _checked(index, path).items()}

    try:
        described = describe() if mesh is None else _agreed(describe)
        assert described is not None
        rest, tensors = described
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is, and nobody asked for it
            dcp.load(tensors, storage_reader=_Reader(path), no_dist=mesh is None)
        return _put_together(rest, tensors)
    except UserError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # of pickles, archives and sizes that do not fit
        line = f"{error}".strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"the checkpoint {path} is damaged ({line[-1][:200]}); resume from another one, or begin anew"
        ) from error


def _taken_apart(checkpoint: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the tensors of the state dicts under flat names, and the rest with where the tensors go."""
    tensors = {f"state_dict/{name}": value for name, value in checkpoint["state_dict"].items()}
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    if "optimizer_states" in checkpoint:
        rest["optimizer_states"] = []
        for number, optimizer in enumerate(checkpoint["optimizer_states"]):
            plain: dict[int, dict[str, Any]] = {}
            for place, known in optimizer["state"].items():
                plain[place] = {key: value for key, value in known.items() if not isinstance(value, torch.Tensor)}
                for key in known.keys() - plain[place].keys():
                    tensors[f"optimizer/{number}/{place}/{key}"] = known[key]
            rest["optimizer_states"].append(optimizer | {"state": plain})
    rest[_PARTS] = {key: getattr(value.placements[0], "dim", None) for key, value in tensors.items() if is_part(value)}
    return tensors, rest


def _put_together(rest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    rest["state_dict"] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "state_dict":
            rest[kind][name] = value
        else:
            number, place, inner = name.split("/", 2)
            rest["optimizer_states"][int(number)]["state"][int(place)][inner] = value
    return rest


def _room(about: TensorStorageMetadata, dim: int | None, mesh: Any) -> torch.Tensor:
    """Returns an empty tensor to read into."""
    if mesh is None or dim is None:
        return torch.empty(about.size, dtype=about.properties.dtype)
    placement = Replicate() if dim is None else Shard(dim)
    return empty(about.size, dtype=about.properties.dtype, device_mesh=mesh, placements=[placement])


def _checked(index: Metadata, path: Path) -> dict[str, TensorStorageMetadata]:
    """Returns what the tensors are, if they are tensors, no larger than the folder and in its files."""
    stored = {
        key: about for key, about in index.state_dict_metadata.items() if isinstance(about, TensorStorageMetadata)
    }
    if len(stored) < len(index.state_dict_metadata):
        raise UserError(f"the checkpoint {path} holds other things than tensors; it was not written by lte-lightning")
    if any(Path(info.relative_path).name != info.relative_path for info in index.storage_data.values()):
        raise UserError(f"the checkpoint {path} names files outside of its folder")
    size = sum(about.size.numel() * about.properties.dtype.itemsize for about in stored.values())
    if size > sum(file.stat().st_size for file in path.iterdir()):
        raise UserError(f"the checkpoint {path} lacks files: it should hold {size} bytes of tensors")
    return stored


class _Reader(dcp.FileSystemReader):
    """Reads an index without running what a pickle may name."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / INDEX, "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        assert isinstance(metadata, Metadata)
        return metadata


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name.endswith("Path"):  # where the folder was when it was written
            return PurePosixPath
        known = getattr(torch, name, None) if module == "torch" else None
        if (module, name) in _NAMES or isinstance(known, torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}, which no checkpoint needs")


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)

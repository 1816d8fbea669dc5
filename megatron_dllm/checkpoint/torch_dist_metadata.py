"""The `.metadata` of a torch_dist checkpoint, read without running anything that a pickle may carry.

`.metadata` is a pickle by torch's own definition of the format. Each record that torch writes there becomes an inert
record of our own; see checkpoint/unpickling.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_dllm.checkpoint.unpickling import TableUnpickler

METADATA_NAME = ".metadata"
CONFIG_NAME = "metadata.json"
COMMON_NAME = "common.pt"

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_RECORDS = {
    *(
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *((_PLANNER, name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}


class _Record:
    """What every pickled object becomes: its arguments and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        return self.state.get(name, default)


class _TensorRecord(_Record):
    """A TensorStorageMetadata; other entries of the state dict hold objects."""


def _find_record(module: str, name: str) -> Any:
    if (module, name) == ("torch", "Size"):
        return lambda *arguments: tuple(arguments[0]) if arguments else ()
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if (module, name) in _RECORDS:
        # A class of this call's own: a pickle that writes into it changes nothing outside.
        base = _TensorRecord if name == "TensorStorageMetadata" else _Record
        return type(name, (base,), {})
    return None


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the bytes (a `torch.save` archive) that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file_name: str
    start: int
    length: int


@dataclass(frozen=True)
class DistTensor:
    """One tensor of the checkpoint with all its chunks."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class DistMetadata:
    """What a torch_dist checkpoint holds: tensors by key, and the keys of other objects."""

    tensors: dict[str, DistTensor]
    object_keys: frozenset[str]


def read_metadata(folder: Path) -> DistMetadata:
    """Read a checkpoint's table of contents.

    Raises:
        ValueError: the folder is no torch_dist checkpoint, is half-written, or its metadata is damaged
            or holds anything but DCP records.
    """
    path = folder / METADATA_NAME
    if not folder.is_dir():
        raise ValueError(f"{folder} is no directory; name a torch_dist checkpoint folder.")
    for name in (CONFIG_NAME, METADATA_NAME):
        if not (folder / name).is_file():
            found = sorted(entry.name for entry in folder.iterdir())[:8]
            raise ValueError(
                f"{folder} is no complete torch_dist checkpoint: {name} is missing (found {found}); "
                "name the step folder itself, or save again."
            )
    metadata = _read_records(path)
    try:
        return _tables(folder, metadata)
    except (AttributeError, LookupError, TypeError) as error:
        raise _damaged(path, error) from error


def check_metadata(folder: Path) -> None:
    """Refuse a `.metadata` that names anything but the records of torch's checkpoint format, before torch loads it.

    Raises:
        ValueError: naming what it would have run, or that it cannot be read.
    """
    _read_records(folder / METADATA_NAME)


def _read_records(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return TableUnpickler(file, "a checkpoint's metadata", _find_record).load()
    except Exception as error:  # damaged bytes raise whatever they are taken for
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is not the metadata of a torch_dist checkpoint, or damaged ({error!r}); it was not loaded. Take "
        "checkpoints from people you trust, or convert their safetensors."
    )


def _tables(folder: Path, metadata: _Record) -> DistMetadata:
    places: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]] = {}
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    for index, info in metadata.get("storage_data").items():
        place = (info.get("relative_path"), info.get("offset"), info.get("length"))
        _check_place(folder, index.get("fqn"), place, sizes)
        if info.get("transform_descriptors"):
            raise ValueError(f"{folder}: {index.get('fqn')} is stored compressed; save without stream transforms.")
        places[index.get("fqn"), index.get("offset")] = place
    tensors, objects = {}, set()
    for key, entry in metadata.get("state_dict_metadata").items():
        if not isinstance(entry, _TensorRecord):
            objects.add(key)
            continue
        dtype = entry.get("properties").state[0]
        chunks = tuple(_chunk(folder, key, chunk, places) for chunk in entry.get("chunks"))
        tensors[key] = DistTensor(dtype, tuple(entry.get("size")), chunks)
        _check_whole(folder, key, tensors[key])
    return DistMetadata(tensors, frozenset(objects))


def _check_whole(folder: Path, key: str, tensor: DistTensor) -> None:
    num_stored, num_elements = sum(prod(chunk.sizes) for chunk in tensor.chunks), prod(tensor.shape)
    if num_stored < num_elements:
        raise ValueError(
            f"{folder}: tensor {key} is stored incompletely ({num_stored} of {num_elements} elements); save it again."
        )


def _check_place(folder: Path, name: str, place: tuple[str, int, int], sizes: dict[str, int]) -> None:
    file_name, start, length = place
    if file_name not in sizes:
        raise ValueError(f"{folder / file_name} is missing: it holds {name}; copy the whole folder.")
    if start < 0 or length < 0 or start + length > sizes[file_name]:
        raise ValueError(
            f"{folder / file_name} is truncated: {name} ends at byte {start + length}, the file at "
            f"{sizes[file_name]}; copy or save it again."
        )


def _chunk(folder: Path, key: str, record: _Record, places: dict[Any, tuple[str, int, int]]) -> Chunk:
    offsets = tuple(record.get("offsets"))
    if (key, offsets) not in places:
        raise ValueError(
            f"{folder}: tensor {key} has no data for its part at {list(offsets)}; the checkpoint is damaged."
        )
    return Chunk(offsets, tuple(record.get("sizes")), *places[key, offsets])

"""Folders of safetensors files, read and written tensor by tensor with plain file reads.

Nothing is mapped into memory: a mapped 200 GB folder counts as resident memory once it is read. The
format is a length (8 bytes), a JSON header and the raw tensors, so reading it cannot run code.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dllm.run.files import naming, parse_json, read_json_object, refuse_dead_link, write_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
_MAX_HEADER_BYTES = 100 * 1024**2
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `start` is its first byte in `path`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read one file's header and check it against the file's size.

    Raises:
        ValueError: the file is truncated, or its header is not one of a safetensors file.
    """
    refuse_dead_link(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; download it again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} ({size} bytes) is no whole safetensors file: its header would take {length} "
                "bytes; download or write it again."
            )
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise ValueError(
                f"{path} has a corrupt safetensors header ({error}); download or write it again."
            ) from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a corrupt safetensors header (no JSON object); download or write it again.")
    tensors = [_stored_tensor(path, 8 + length, *item) for item in header.items() if item[0] != "__metadata__"]
    end = 8 + length
    for name, tensor in sorted(tensors, key=lambda item: item[1].start):
        if tensor.start != end:
            raise ValueError(
                f"{path}: tensor {name} does not begin where the one before it ends; the header is corrupt."
            )
        end = tensor.start + tensor.num_bytes
        if end > size:
            raise ValueError(
                f"{path} is truncated: tensor {name} ends at byte {end}, the file at {size}; "
                "download or write it again."
            )
    if end != size:
        raise ValueError(f"{path} has {size - end} bytes after its last tensor; download or write it again.")
    return dict(tensors)


def _stored_tensor(path: Path, begin: int, name: str, entry: Any) -> tuple[str, StoredTensor]:
    """One entry of a header; `begin` is the byte at which the tensors begin."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        is_whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path}: tensor {name} has a corrupt entry in the header; download or write the file again.")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {name} has dtype {dtype}; known are {', '.join(DTYPES)}.")
    tensor = StoredTensor(path, DTYPES[dtype], shape, begin + start)
    if tensor.num_bytes != end - start:
        raise ValueError(f"{path}: tensor {name} does not lie where its shape says; the header is corrupt.")
    return name, tensor


class SafetensorsFolder:
    """The tensors of a folder: with an index, without one, or in a single file."""

    def __init__(self, folder: Path) -> None:
        """Read all headers.

        Args:
            folder: holds `*.safetensors`.

        Raises:
            ValueError: there are no files, one is damaged, or the index and the files disagree.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._files: dict[Path, int] = {}
        index = _read_index(folder)
        for path in _shard_paths(folder, index):
            for name, tensor in read_header(path).items():
                if name in self.tensors:
                    raise ValueError(
                        f"{path}: tensor {name} is also in {self.tensors[name].path.name}; "
                        "keep one set of shards in the folder."
                    )
                self.tensors[name] = tensor
        for name, file_name in (index or {}).items():
            if name not in self.tensors or self.tensors[name].path.name != file_name:
                raise ValueError(
                    f"{folder / INDEX_NAME} names tensor {name} in {file_name}, which does not hold it; "
                    "download the folder again."
                )

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Read a run of elements into `out`.

        Args:
            name: tensor.
            start: first element.
            out: [n] contiguous, of the tensor's dtype.

        Raises:
            ValueError: the file ended early.
        """
        tensor = self.tensors[name]
        read_exactly(
            descriptor_of(tensor.path, self._files),
            tensor.start + start * tensor.dtype.itemsize,
            out,
            f"{tensor.path}: {name}",
        )

    def close(self) -> None:
        """Close the open shards."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def descriptor_of(path: Path, files: dict[Path, int]) -> int:
    """The descriptor of a file, opened on first use and kept in `files`; several threads may ask at once."""
    if path not in files:
        opened = os.open(path, os.O_RDONLY)
        if files.setdefault(path, opened) != opened:
            os.close(opened)
    return files[path]


def read_exactly(descriptor: int, position: int, out: Tensor, what: str) -> None:
    """Fill `out` (contiguous) from a file, or raise ValueError naming `what`."""
    view = out.view(torch.uint8).numpy().data
    while view:
        count = os.preadv(descriptor, [view], position)
        if count == 0:
            raise ValueError(f"{what} is truncated: the file ends {len(view)} bytes early.")
        view, position = view[count:], position + count


def write_all(descriptor: int, position: int, data: Tensor) -> None:
    """Write `data` (contiguous) at a position of a file."""
    view = data.view(torch.uint8).numpy().data
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    weight_map = read_json_object(path, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file_name, str) for file_name in weight_map.values()):
        raise ValueError(f"{path} is no safetensors index (weight_map names no shards); download it again.")
    if (folder / SINGLE_NAME).is_file() and SINGLE_NAME not in weight_map.values():
        raise ValueError(
            f"{folder / SINGLE_NAME} lies beside {path.name}, which names other files: transformers would read the "
            "former; keep one set of shards in the folder."
        )
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name:
            raise ValueError(f"{path} names the shard {file_name!r}; a shard lies in the folder itself.")
        refuse_dead_link(folder / file_name)
        if not (folder / file_name).is_file():
            raise ValueError(f"{path} names the shard {file_name}, which is missing; download it too.")
    return dict(weight_map)


def _shard_paths(folder: Path, index: dict[str, str] | None) -> list[Path]:
    if index is not None:
        return [folder / file_name for file_name in sorted(set(index.values()))]
    paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not paths:
        pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
        hint = f" ({pickles[0]} is a pickle, which may run code: save as safetensors)" if pickles else ""
        raise ValueError(f"{folder} holds no .safetensors file{hint}; name a Hugging Face model folder.")
    return paths


class SafetensorsWriter:
    """Writes a folder whose tensors are all known beforehand, in any order of elements."""

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Decide which tensor goes into which file, and write the headers.

        Args:
            folder: exists.
            tensors: dtype and shape of every tensor, in the order in which shards fill up.
            max_shard_bytes: a shard holds at most this much, unless one tensor alone is larger.
        """
        self._folder = folder
        self._places: dict[str, tuple[int, int, torch.dtype]] = {}
        self._descriptors: list[int] = []
        shards = _fill_shards(tensors, max_shard_bytes)
        names = (
            [SINGLE_NAME]
            if len(shards) == 1
            else [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
        )
        total = sum(_num_bytes(entry) for entry in tensors.values())
        for file_name, shard in zip(names, shards, strict=True):
            self._begin_shard(file_name, {name: tensors[name] for name in shard})
        if len(shards) > 1:
            weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / INDEX_NAME, index, indent=2)

    def _begin_shard(self, file_name: str, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        # With the wider dtypes first, every tensor is aligned, as readers that map the file expect.
        ordered = sorted(tensors.items(), key=lambda item: -item[1][0].itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, entry in ordered:
            begin, end = end, end + _num_bytes(entry)
            header[name] = {"dtype": _NAMES[entry[0]], "shape": list(entry[1]), "data_offsets": [begin, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        descriptor = os.open(self._folder / file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        with naming(self._folder / file_name):
            os.write(descriptor, len(encoded).to_bytes(8, "little") + encoded)
            os.ftruncate(descriptor, 8 + len(encoded) + end)
        position = 8 + len(encoded)
        for name, entry in ordered:
            self._places[name] = (descriptor, position, entry[0])
            position += _num_bytes(entry)

    def write(self, name: str, start: int, data: Tensor) -> None:
        """Write a run of elements.

        Args:
            name: tensor.
            start: first element of the run.
            data: [n] contiguous, of the tensor's dtype.
        """
        descriptor, position, dtype = self._places[name]
        assert data.dtype == dtype, f"{name} was announced as {dtype}, not {data.dtype}"
        with naming(self._folder):
            write_all(descriptor, position + start * dtype.itemsize, data)

    def close(self) -> None:
        """Flush everything to the disk and close."""
        while self._descriptors:
            descriptor = self._descriptors.pop()
            with naming(self._folder):
                os.fsync(descriptor)
                os.close(descriptor)

    def abandon(self) -> None:
        """Close without waiting for the disk: the folder is about to be deleted."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def _num_bytes(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return prod(entry[1]) * entry[0].itemsize


def _fill_shards(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in tensors.items():
        if shards[-1] and filled + _num_bytes(entry) > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _num_bytes(entry)
    return shards

"""A torch_dist checkpoint, written box by box: no process group, no GPU, no model.

The files are those of torch.distributed.checkpoint, as `megatron.core.dist_checkpointing` writes them:
every box is a `torch.save` archive in a `.distcp` file, and `.metadata` says which lies where.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dllm.checkpoint.torch_dist_metadata import COMMON_NAME, CONFIG_NAME, METADATA_NAME
from megatron_dllm.run.files import naming

MAX_FILE_BYTES = 4 * 10**9
# Below this, handing the bytes to the hashing thread costs more than hashing them.
_WORTH_A_THREAD = 1 << 18
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TorchDistWriter:
    """Writes a checkpoint that `megatron.core.dist_checkpointing.load` reads into any layout."""

    def __init__(self, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Begin in an empty folder."""
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._file: _HashedFile | None = None
        self._checksums: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._objects: dict[str, BytesStorageMetadata] = {}

    def add(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Announce a tensor."""
        self._tensors[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])

    def write(self, key: str, offsets: tuple[int, ...], tensor: Tensor) -> None:
        """Write one box of a tensor; boxes must not overlap.

        Args:
            key: an announced tensor.
            offsets: where the box begins.
            tensor: the box, contiguous, the only user of its storage.
        """
        entry = self._tensors[key]
        assert tensor.dtype == entry.properties.dtype, f"{key} was announced as {entry.properties.dtype}"
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.dtype.itemsize, f"{key}: storage is shared"
        place = self._append(tensor)
        self._places[MetadataIndex(key, offsets, len(entry.chunks))] = place
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))

    def alias(self, key: str, other_key: str) -> None:
        """Let `other_key` name the same bytes as `key`."""
        entry = self._tensors[key]
        self._tensors[other_key] = entry
        for number, chunk in enumerate(entry.chunks):
            place = self._places[MetadataIndex(key, chunk.offsets)]
            self._places[MetadataIndex(other_key, chunk.offsets, number)] = place

    def add_empty_objects(self, keys: list[str]) -> None:
        """Store None under every key; all of them share the same bytes."""
        place = self._append([None])
        for key in keys:
            self._objects[key] = BytesStorageMetadata()
            self._places[MetadataIndex(key)] = place

    def _append(self, data: Any) -> _StorageInfo:
        if self._file is not None and self._file.size >= self._max_file_bytes:
            self._end_file()
        if self._file is None:
            self._file = _HashedFile(self._folder / f"__0_{len(self._checksums)}.distcp")
        start = self._file.size
        torch.save(data, self._file)  # type: ignore[arg-type]
        return _StorageInfo(self._file.path.name, start, self._file.size - start)

    def _end_file(self) -> None:
        assert self._file is not None
        self._checksums[self._file.path.name] = self._file.finish()
        self._file = None

    def close(self) -> dict[str, dict[str, Any]]:
        """Write the table of contents and bring everything to the disk.

        Returns:
            Size and sha256 of every file written, by name.

        Raises:
            ValueError: a tensor was not written in full.
        """
        for key, entry in self._tensors.items():
            written = sum(prod(chunk.sizes) for chunk in entry.chunks)
            if written != prod(entry.size):
                raise ValueError(f"tensor {key} was written incompletely: {written} of {prod(entry.size)} elements.")
        if self._file is not None:
            self._end_file()
        metadata = Metadata({**self._tensors, **self._objects}, None, self._places, StorageMeta(), "1.0.0")
        common = BytesIO()
        torch.save({}, common)
        # megatron-core takes the last of these as the sign of a checkpoint.
        for name, data in (
            (METADATA_NAME, pickle.dumps(metadata)),
            (COMMON_NAME, common.getvalue()),
            (CONFIG_NAME, json.dumps(_CONFIG).encode()),
        ):
            file = _HashedFile(self._folder / name)
            file.write(data)
            self._checksums[name] = file.finish()
        return self._checksums

    def abandon(self) -> None:
        """Close without a table of contents: the folder is about to be deleted."""
        if self._file is not None:
            self._file.close()


class _HashedFile:
    """A new file whose sha256 is computed by a second thread while the first one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        hashed = self._hasher.submit(self._digest.update, view) if len(view) > _WORTH_A_THREAD else None
        written = 0
        with naming(self.path):
            while written < len(view):
                written += self._file.write(view[written:])
        if hashed is not None:
            hashed.result()
        else:
            self._digest.update(view)
        self.size += written
        return written

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self) -> dict[str, Any]:
        """Bring the file to the disk; returns its size and sha256."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        self.close()
        return {"size": self.size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._hasher.shutdown()
        with naming(self.path):  # what an error has left in its buffer is written now
            self._file.close()

"""Tensors of a torch_dist checkpoint, read box by box: no process group, no GPU, no model.

The files are those of torch.distributed.checkpoint: every chunk of a tensor is a `torch.save` archive
somewhere in a `.distcp` file. An archive is a zip whose tensor record is stored uncompressed, so any
run of its rows can be read by position, without loading the chunk.
"""

from __future__ import annotations

import os
import zipfile
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from io import BytesIO, RawIOBase
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dllm.checkpoint.torch_dist_metadata import Chunk, DistMetadata, read_metadata
from megatron_dllm.checkpoint.unpickling import TableUnpickler
from megatron_dllm.hf.safetensors_io import descriptor_of, read_exactly


class _Slice(RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._position = descriptor, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._position, 0)
        data = os.pread(self._descriptor, left if size < 0 else min(size, left), self._start + self._position)
        self._position += len(data)
        return data


@dataclass(frozen=True)
class _Layout:
    """Where the elements of a chunk begin in its file; None: not row by row, load it as a whole."""

    position: int | None


class TorchDistReader:
    """A checkpoint's tensors, readable in any box whatever the layout it was saved with."""

    def __init__(self, folder: Path) -> None:
        """Read the table of contents (not the tensors).

        Raises:
            ValueError: see `read_metadata`.
        """
        self.folder = folder
        self.metadata: DistMetadata = read_metadata(folder)
        self._files: dict[Path, int] = {}
        self._layouts: dict[Chunk, _Layout] = {}
        self._sorted: dict[str, tuple[list[Chunk], list[int], int]] = {}
        self._headers: dict[tuple[int, tuple[int, ...], torch.dtype], bytes] = {}

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], out: Tensor) -> None:
        """Read a box of a tensor.

        Args:
            key: tensor.
            offsets: first element of the box in every dim.
            sizes: size of the box in every dim.
            out: [prod(sizes)] contiguous, of the tensor's dtype.

        Raises:
            ValueError: the chunks do not cover the box, or a file is damaged.
        """
        box = out.view(sizes)
        covered = 0
        for chunk in self._near(key, offsets, sizes):
            low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            target = box[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True))]
            self._read_part(key, chunk, tuple(a - o for a, o in zip(low, chunk.offsets, strict=True)), target)
            covered += target.numel()
            if covered == box.numel():
                return
        if covered != box.numel():
            raise ValueError(
                f"{self.folder}: tensor {key} is stored incompletely ({covered} of {box.numel()} elements "
                f"of the part at {list(offsets)}); save it again."
            )

    def _near(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[Chunk]:
        """Chunks that overlap a box along dim 0: a layer's experts are hundreds of chunks, a box is in few of them."""
        if not offsets:
            return list(self.metadata.tensors[key].chunks)
        if key not in self._sorted:
            chunks = sorted(self.metadata.tensors[key].chunks, key=lambda chunk: chunk.offsets)
            longest = max((chunk.sizes[0] for chunk in chunks), default=0)
            self._sorted[key] = (chunks, [chunk.offsets[0] for chunk in chunks], longest)
        chunks, starts, longest = self._sorted[key]
        return chunks[bisect_right(starts, offsets[0] - longest) : bisect_left(starts, offsets[0] + sizes[0])]

    def _read_part(self, key: str, chunk: Chunk, start: tuple[int, ...], target: Tensor) -> None:
        """Read the box of `chunk` that begins at `start` and is shaped like `target`."""
        what = f"{self.folder / chunk.file_name}: {key}"
        layout = self._layout(key, chunk)
        if layout.position is None:
            box = tuple(slice(a, a + n) for a, n in zip(start, target.shape, strict=True))
            target.copy_(self._load_chunk(key, chunk)[box])
            return
        first, run = _contiguous_run(chunk.sizes, start, tuple(target.shape))
        staging = target if run == target.numel() and target.is_contiguous() else None
        if staging is None:
            # Columns of the chunk: read the rows that span them, keep the columns.
            whole = torch.empty(run, dtype=target.dtype)
            self._pread(chunk, layout.position, first, whole, what)
            target.copy_(torch.as_strided(whole, target.shape, _strides(chunk.sizes)))
            return
        self._pread(chunk, layout.position, first, staging.view(-1), what)

    def _pread(self, chunk: Chunk, position: int, first: int, out: Tensor, what: str) -> None:
        read_exactly(self._descriptor(chunk.file_name), position + first * out.dtype.itemsize, out, what)

    def _descriptor(self, file_name: str) -> int:
        return descriptor_of(self.folder / file_name, self._files)

    def _layout(self, key: str, chunk: Chunk) -> _Layout:
        if chunk not in self._layouts:
            self._layouts[chunk] = self._find_layout(key, chunk)
        return self._layouts[chunk]

    def _find_layout(self, key: str, chunk: Chunk) -> _Layout:
        dtype = self.metadata.tensors[key].dtype
        descriptor = self._descriptor(chunk.file_name)
        # Archives of equal shapes begin with equal bytes, up to the elements: one of them is taken apart.
        kind = (chunk.length, chunk.sizes, dtype)
        header = self._headers.get(kind)
        if header is not None and os.pread(descriptor, len(header), chunk.start) == header:
            return _Layout(chunk.start + len(header))
        try:
            position = _tensor_position(_Slice(descriptor, chunk.start, chunk.length), chunk, dtype)
        except Exception as error:  # damaged bytes raise whatever they are taken for
            raise ValueError(
                f"{self.folder / chunk.file_name}: tensor {key} is damaged at byte {chunk.start} "
                f"({error}); copy or save it again."
            ) from error
        if position is not None:
            self._headers[kind] = os.pread(descriptor, position - chunk.start, chunk.start)
        return _Layout(position)

    def _load_chunk(self, key: str, chunk: Chunk) -> Tensor:
        data = _Slice(self._descriptor(chunk.file_name), chunk.start, chunk.length).read()
        try:
            tensor = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{self.folder / chunk.file_name}: tensor {key} is damaged at byte {chunk.start} "
                f"({error}); copy or save it again."
            ) from error
        entry = self.metadata.tensors[key]
        if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != (chunk.sizes, entry.dtype):
            raise ValueError(
                f"{self.folder / chunk.file_name}: {key} does not hold the tensor it should; save it again."
            )
        return tensor

    def close(self) -> None:
        """Close the open files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def _strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(sizes[dim + 1 :]) for dim in range(len(sizes)))


def _contiguous_run(sizes: tuple[int, ...], start: tuple[int, ...], box: tuple[int, ...]) -> tuple[int, int]:
    """First element, and number of elements up to the last one, of a box inside a contiguous tensor."""
    strides = _strides(sizes)
    first = sum(a * stride for a, stride in zip(start, strides, strict=True))
    return first, 1 + sum((n - 1) * stride for n, stride in zip(box, strides, strict=True))


def _find_in_archive(module: str, name: str) -> Any:
    """What the description of one tensor in a `torch.save` archive may name; builds nothing."""
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
        return lambda storage, offset, size, stride, *_: (storage, offset, tuple(size), tuple(stride))
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
        return lambda tensor, *_: tensor
    if (module, name) == ("collections", "OrderedDict"):
        return dict
    return name if module == "torch" and name.endswith("Storage") else None


def _tensor_position(data: _Slice, chunk: Chunk, dtype: torch.dtype) -> int | None:
    """Byte of the chunk's file at which its elements begin, or None where they are not laid out in rows."""
    with zipfile.ZipFile(data) as archive:
        names = {name.split("/", 1)[1]: archive.getinfo(name) for name in archive.namelist()}
        if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
            raise ValueError("it was written on a big-endian machine")
        pickled = BytesIO(archive.read(names["data.pkl"]))
        unpickler = TableUnpickler(pickled, "a tensor's archive", _find_in_archive, has_storages=True)
        storage, offset, size, stride = unpickler.load()
        if size != chunk.sizes:
            raise ValueError(f"its shape is {list(size)}, the table of contents says {list(chunk.sizes)}")
        record = names[f"data/{storage[2]}"]
        in_rows = all(n == 1 or given == wanted for n, given, wanted in zip(size, stride, _strides(size), strict=True))
        stored = storage[1].removesuffix("Storage").lower()
        if not in_rows or record.compress_type != zipfile.ZIP_STORED or stored != _STORAGE_NAMES.get(dtype):
            return None
        data.seek(record.header_offset)
        header = data.read(30)
        names_length = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return chunk.start + record.header_offset + 30 + names_length + int(offset) * dtype.itemsize


_STORAGE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "half", torch.float32: "float", torch.float64: "double"}

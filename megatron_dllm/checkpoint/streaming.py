"""Moves tensors from files to files: other threads read ahead while the caller writes, in fixed memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from queue import SimpleQueue

import torch
from torch import Tensor
from tqdm import tqdm

# Largest piece held in memory at once, and how many: 4 x 64 MB.
MAX_PIECE_BYTES = 64 * 1024**2
_NUM_BUFFERS = 4
_MAX_BATCH = 256


@dataclass(frozen=True)
class Task:
    """A piece to move.

    Attributes:
        name: what to call it in an error.
        num_elements: its size.
        dtype: of the piece as it is read.
        read: fills a flat tensor of that size and dtype.
        write: takes it.
    """

    name: str
    num_elements: int
    dtype: torch.dtype
    read: Callable[[Tensor], None]
    write: Callable[[Tensor], None]


def run(tasks: Iterable[Task], total_bytes: int, title: str, num_readers: int = 1) -> None:
    """Read, check and write every piece in order.

    Args:
        tasks: pieces of at most MAX_PIECE_BYTES each.
        total_bytes: their sum, for the progress bar.
        title: of the progress bar.
        num_readers: threads that call `read`, each of another batch; more than one where reading computes.

    Raises:
        ValueError: a piece holds NaN or Inf, or could not be read.
    """
    buffers: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(_NUM_BUFFERS):
        buffers.put(torch.empty(0, dtype=torch.uint8))
    with (
        ThreadPoolExecutor(num_readers) as reader,
        tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, smoothing=0.05, disable=None) as bar,
    ):
        pending: deque[tuple[list[Task], Future[tuple[Tensor, list[Tensor]]]]] = deque()
        try:
            for batch in _batches(tasks):
                pending.append((batch, reader.submit(_read, batch, buffers)))
                if len(pending) == _NUM_BUFFERS - 1:
                    _write(*pending.popleft(), buffers, bar)
            while pending:
                _write(*pending.popleft(), buffers, bar)
        finally:
            for _, future in pending:
                future.cancel()


def _batches(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Group small pieces: handing one to the other thread costs more than reading it."""
    batch: list[Task] = []
    num_bytes = 0
    for task in tasks:
        size = _aligned(task.num_elements * task.dtype.itemsize)
        if batch and (num_bytes + size > MAX_PIECE_BYTES or len(batch) == _MAX_BATCH):
            yield batch
            batch, num_bytes = [], 0
        batch.append(task)
        num_bytes += size
    if batch:
        yield batch


def _aligned(num_bytes: int) -> int:
    return num_bytes + -num_bytes % 64


def _read(batch: list[Task], buffers: SimpleQueue[Tensor]) -> tuple[Tensor, list[Tensor]]:
    buffer = buffers.get()
    needed = sum(_aligned(task.num_elements * task.dtype.itemsize) for task in batch)
    if buffer.numel() < needed:
        buffer = torch.empty(needed, dtype=torch.uint8)
    view = buffer.numpy().data
    pieces: list[Tensor] = []
    begin = 0
    for task in batch:
        num_bytes = task.num_elements * task.dtype.itemsize
        # A storage of exactly the piece's size: torch.save writes whole storages.
        data = torch.frombuffer(view[begin : begin + num_bytes], dtype=task.dtype)
        task.read(data)
        check_finite(data, task.name)
        pieces.append(data)
        begin += _aligned(num_bytes)
    return buffer, pieces


def _write(
    batch: list[Task], future: Future[tuple[Tensor, list[Tensor]]], buffers: SimpleQueue[Tensor], bar: tqdm[None]
) -> None:
    buffer, pieces = future.result()
    for task, data in zip(batch, pieces, strict=True):
        task.write(data)
        bar.update(data.numel() * data.dtype.itemsize)
    buffers.put(buffer)


def check_finite(data: Tensor, name: str) -> None:
    """Raise ValueError naming the tensor if it holds NaN or Inf.

    Args:
        data: [n] any floating dtype.
        name: of the tensor, for the error.
    """
    if not data.is_floating_point() or not data.numel():
        return
    low, high = torch.aminmax(data)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = (~torch.isfinite(data)).nonzero()
    raise ValueError(
        f"tensor {name} holds {len(bad)} NaN or Inf (the first: {float(data[bad[0]])} at element "
        f"{int(bad[0])} of this piece of {data.numel()}); the checkpoint is not usable, take an earlier "
        "one."
    )


def split_rows(
    offsets: tuple[int, ...], sizes: tuple[int, ...], max_elements: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Cut a box into boxes of at most `max_elements`, along its first dim longer than 1.

    Yields:
        (first element relative to the box, offsets, sizes) of every part.
    """
    dim = next((number for number, size in enumerate(sizes) if size > 1), None)
    if dim is None or prod(sizes) <= max_elements:
        yield 0, offsets, sizes
        return
    row = prod(sizes[dim + 1 :])
    step = max(max_elements // row, 1)
    for begin in range(0, sizes[dim], step):
        count = min(step, sizes[dim] - begin)
        yield (
            begin * row,
            (*offsets[:dim], offsets[dim] + begin, *offsets[dim + 1 :]),
            (*sizes[:dim], count, *sizes[dim + 1 :]),
        )

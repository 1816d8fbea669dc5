"""Moves tensors from files to files: one thread reads ahead while the caller writes, in fixed memory."""

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


def run(tasks: Iterable[Task], total_bytes: int, title: str) -> None:
    """Read, check and write every piece in order.

    Args:
        tasks: pieces of at most MAX_PIECE_BYTES each.
        total_bytes: their sum, for the progress bar.
        title: of the progress bar.

    Raises:
        ValueError: a piece holds NaN or Inf, or could not be read.
    """
    buffers: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(_NUM_BUFFERS):
        buffers.put(torch.empty(0, dtype=torch.uint8))
    with (ThreadPoolExecutor(1) as reader,
          tqdm(total=total_bytes, desc=title, unit="B", unit_scale=True, smoothing=0.05, mininterval=0.5) as bar):
        pending: deque[tuple[Task, Future[tuple[Tensor, Tensor]]]] = deque()
        try:
            for task in tasks:
                pending.append((task, reader.submit(_read, task, buffers)))
                if len(pending) == _NUM_BUFFERS - 1:
                    _write(*pending.popleft(), buffers, bar)
            while pending:
                _write(*pending.popleft(), buffers, bar)
        finally:
            for _, future in pending:
                future.cancel()


def _read(task: Task, buffers: SimpleQueue[Tensor]) -> tuple[Tensor, Tensor]:
    buffer = buffers.get()
    num_bytes = task.num_elements * task.dtype.itemsize
    if buffer.numel() < num_bytes:
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
    # A storage of exactly the piece's size: torch.save writes whole storages.
    data = torch.frombuffer(memoryview(buffer.numpy())[:num_bytes], dtype=task.dtype)
    task.read(data)
    check_finite(data, task.name)
    return buffer, data


def _write(task: Task, future: Future[tuple[Tensor, Tensor]], buffers: SimpleQueue[Tensor], bar: tqdm[None]) -> None:
    buffer, data = future.result()
    task.write(data)
    buffers.put(buffer)
    bar.update(data.numel() * data.dtype.itemsize)


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
    raise ValueError(f"tensor {name} holds {len(bad)} NaN or Inf (the first: {float(data[bad[0]])} at element "
                     f"{int(bad[0])} of this piece of {data.numel()}); the checkpoint is not usable, take an earlier one.")


def split_rows(offsets: tuple[int, ...], sizes: tuple[int, ...],
               max_elements: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Cut a box into boxes of at most `max_elements`, along its first dim longer than 1.

    Yields:
        (first element relative to the box, offsets, sizes) of every part.
    """
    dim = next((number for number, size in enumerate(sizes) if size > 1), None)
    if dim is None or prod(sizes) <= max_elements:
        yield 0, offsets, sizes
        return
    row = prod(sizes[dim + 1:])
    step = max(max_elements // row, 1)
    for begin in range(0, sizes[dim], step):
        count = min(step, sizes[dim] - begin)
        yield (begin * row, (*offsets[:dim], offsets[dim] + begin, *offsets[dim + 1:]),
               (*sizes[:dim], count, *sizes[dim + 1:]))

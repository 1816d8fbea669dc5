"""Rows that an embedding or an output layer is given: drawn around the mean of those it has, or read from a file.

A row far from all others would make its token stand out before it has been trained; the mean of the others does not.
Shapes: n new rows, v rows that are there, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_dllm.hf.safetensors_io import read_exactly, read_header

_PIECE_ELEMENTS = 1 << 23
# Reads the run of rows that begins at the first number into a flat tensor.
ReadRows = Callable[[int, Tensor], None]


def drawn_rows(
    read: ReadRows, size: tuple[int, int], dtype: torch.dtype, number: int, noise: float, seed: int
) -> Tensor:
    """Rows around the mean: mean + noise x standard deviation x a standard normal number, feature by feature.

    Args:
        read: gives the rows that are there.
        size: (v, h).
        dtype: of the rows that are there.
        number: of new rows, n.
        noise: share of the standard deviation over the rows; 0: all new rows are the mean.
        seed: of the normal numbers.

    Returns:
        [n, h] fp32.
    """
    num_rows, width = size
    total, squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    step = max(_PIECE_ELEMENTS // width, 1)
    for first in range(0, num_rows, step):
        piece = torch.empty(min(step, num_rows - first) * width, dtype=dtype)
        read(first, piece)
        rows = piece.view(-1, width).double()
        total += rows.sum(dim=0)
        squares += rows.square().sum(dim=0)
    mean = total / num_rows
    deviation = (squares / num_rows - mean.square()).clamp(min=0.0).sqrt()
    normals = torch.randn(number, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mean + noise * deviation * normals).float()


def given_rows(path: Path, name: str, shape: tuple[int, int]) -> Tensor:
    """Rows of a safetensors file.

    Args:
        path: of the file.
        name: of the tensor in it.
        shape: (n, h) that it must have.

    Returns:
        [n, h] fp32.

    Raises:
        ValueError: the file lacks the tensor, or it has another shape, kind or a number that is not finite.
    """
    tensors = read_header(path)
    if name not in tensors:
        raise ValueError(f"{path} holds no tensor {name} (found {', '.join(sorted(tensors)) or 'none'}); add it.")
    tensor = tensors[name]
    if tensor.shape != shape or not tensor.dtype.is_floating_point:
        raise ValueError(
            f"{path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, the new rows are floating point "
            f"{list(shape)}; give one row for each."
        )
    rows = torch.empty(shape[0] * shape[1], dtype=tensor.dtype)
    with path.open("rb") as file:
        read_exactly(file.fileno(), tensor.start, rows, f"{path}: {name}")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{path}: tensor {name} holds NaN or Inf; give numbers.")
    return rows.view(shape).float()

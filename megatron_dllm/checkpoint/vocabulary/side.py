"""A model with more rows in its vocabulary, of either format: everything else is copied, bit for bit.

A side is a format: what its tensors are called, how they are read and written, and what lies beside them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_dllm.checkpoint.output_folder import output_folder
from megatron_dllm.checkpoint.streaming import MAX_PIECE_BYTES, Task, run, split_rows
from megatron_dllm.checkpoint.vocabulary.new_rows import drawn_rows, given_rows
from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles

# Megatron's tensors with a row for each token, and what a file with new rows calls them.
ROLES = {"embedding.word_embeddings.weight": "embedding", "output_layer.weight": "output_layer"}
# Takes a piece: of a tensor, from an element on, which is the box at some offsets of some sizes.
WriteBox = Callable[[str, int, tuple[int, ...], tuple[int, ...], Tensor], None]


@dataclass(frozen=True)
class NewVocabulary:
    """What becomes of the vocabulary.

    Attributes:
        size: rows afterwards.
        ids: new tokens of the tokenizer, by text.
        noise: on the mean of the rows, in their standard deviations.
        seed: of the noise.
        rows: safetensors file with the new rows; None: drawn.
    """

    size: int
    ids: Mapping[str, int]
    noise: float
    seed: int
    rows: Path | None = None


@dataclass(frozen=True)
class SideTensor:
    """A tensor of the model or of its optimizer.

    Attributes:
        dtype: of its elements.
        shape: before the rows are added.
        role: which of ROLES its rows are; None: it has no row for a token.
        is_optimizer: a state of the optimizer.
        is_moment: one whose new rows are 0.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    role: str | None = None
    is_optimizer: bool = False
    is_moment: bool = False


class Side(ABC):
    """A model on disk that rows are added to.

    Attributes:
        folder: where it lies.
        model: as it is.
        tokenizer: its own; one without files where it has none.
        tensors: in the order in which they are written.
    """

    folder: Path
    model: ModelConfig
    tokenizer: TokenizerFiles
    tensors: dict[str, SideTensor]

    @abstractmethod
    def read(self, name: str, first: int, offsets: tuple[int, ...], sizes: tuple[int, ...], out: Tensor) -> None:
        """Read a box, which is the run of elements from `first`, into `out` [prod(sizes)]."""

    @abstractmethod
    def write(self, target: Path, vocabulary: NewVocabulary, rows: Mapping[str, Tensor]) -> None:
        """Write the model into an empty folder.

        Args:
            target: the folder.
            vocabulary: the new one.
            rows: [n, h] fp32 new rows of each role.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def shape(self, name: str, vocabulary: NewVocabulary) -> tuple[int, ...]:
        """Of a tensor, once the rows are added."""
        tensor = self.tensors[name]
        return tensor.shape if tensor.role is None else (vocabulary.size, *tensor.shape[1:])

    def copy(self, write: WriteBox) -> None:
        """Read everything that is there, piece by piece, and have it written."""
        run((task for name in self.tensors for task in self._tasks(name, write)), self.num_bytes, "extend_vocab")

    def _tasks(self, name: str, write: WriteBox) -> Iterator[Task]:
        tensor = self.tensors[name]
        boxes = split_rows((0,) * len(tensor.shape), tensor.shape, MAX_PIECE_BYTES // tensor.dtype.itemsize)
        for first, offsets, sizes in boxes:
            yield Task(
                f"{self.folder}: {name}",
                prod(sizes),
                tensor.dtype,
                partial(self.read, name, first, offsets, sizes),
                partial(write, name, first, offsets, sizes),
            )

    def new_rows(self, name: str, rows: Mapping[str, Tensor]) -> Tensor | None:
        """[n, h] what is put behind the rows of a tensor, of its dtype; None: it has no row for a token.

        Args:
            name: of the tensor.
            rows: [n, h] fp32 new rows of each role.
        """
        tensor = self.tensors[name]
        if tensor.role is None:
            return None
        new = rows[tensor.role]
        return (torch.zeros_like(new) if tensor.is_moment else new).to(tensor.dtype, copy=True)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors.values())


def extend(side: Side, output: Path, vocabulary: NewVocabulary) -> None:
    """Write the model with the new vocabulary.

    Args:
        side: the model.
        output: folder to make; must not exist.
        vocabulary: larger than the model's.

    Raises:
        ValueError: the output exists, a tensor cannot be read, or given rows do not fit; nothing is left behind.
    """
    # The optimizer's copy of a row is a few bytes more than what is read.
    with output_folder(output, side.num_bytes * vocabulary.size // side.model.vocab_size) as temporary:
        rows = {
            tensor.role: _rows_of(side, name, vocabulary)
            for name, tensor in side.tensors.items()
            if tensor.role is not None and not tensor.is_optimizer
        }
        side.write(temporary, vocabulary, rows)


def _rows_of(side: Side, name: str, vocabulary: NewVocabulary) -> Tensor:
    """[n, h] fp32 new rows of a tensor of the model."""
    tensor = side.tensors[name]
    num_rows, width = tensor.shape
    number = vocabulary.size - num_rows
    assert tensor.role is not None, f"{name} has no row for a token"
    if vocabulary.rows is not None:
        return given_rows(vocabulary.rows, tensor.role, (number, width))

    def read(first: int, out: Tensor) -> None:
        side.read(name, first * width, (first, 0), (out.numel() // width, width), out)

    # The output layer's noise is another one than the embedding's.
    seed = 2 * vocabulary.seed + list(ROLES.values()).index(tensor.role)
    return drawn_rows(read, (num_rows, width), tensor.dtype, number, vocabulary.noise, seed)

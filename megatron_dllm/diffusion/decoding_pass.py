"""One forward pass of decoding: which tokens of which texts it computes, and whose logits are read.

Texts lie in slots, one a row. A text's tokens come in runs: clean ones (its prompt's whole blocks, a finished block),
whose keys and values are kept, or the noisy block that is being filled, of which nothing is kept. Rows of one pass may
do either, so no text waits for another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dllm.diffusion.roles import BLOCK, CLEAN_VIEW, DOC, PADDING_DOC, VIEW

NOISY_VIEW = 1


@dataclass(frozen=True)
class BlockGrid:
    """How a text is cut into blocks.

    Attributes:
        block_size: tokens denoised together.
        clean_block_size: tokens of finished blocks that see each other; it divides block_size.
    """

    block_size: int
    clean_block_size: int


@dataclass(frozen=True)
class DecodingPass:
    """The tokens of one pass, on the host. Position ids count from a text's start; all documents are number 0.

    Attributes:
        first_slot: row i belongs to the text in slot first_slot + i.
        input_ids: [b, n] int64 token ids; the mask token where nothing is known yet.
        position_ids: [b, n] int64, each row's running on from what is kept of its text.
        roles: [b, n, 3] int32 (doc, block, view); the view is clean where keys and values are to be kept, the document
            PADDING_DOC where there is no token.
        wanted: [P] int64 indexes into the flattened [b * n] tokens whose logits are read, in order.
        counts: how many of them each row has.
    """

    first_slot: int
    input_ids: Tensor
    position_ids: Tensor
    roles: Tensor
    wanted: Tensor
    counts: list[int]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and tokens of a row."""
        return self.input_ids.shape[0], self.input_ids.shape[1]

    def padded(self, num_rows: int, length: int) -> DecodingPass:
        """The same pass with padding up to so many rows and tokens of a row."""
        rows, tokens = num_rows - self.shape[0], length - self.shape[1]
        if not rows and not tokens:
            return self
        more = torch.arange(1, tokens + 1).expand(self.shape[0], tokens)
        positions = torch.cat([self.position_ids, self.position_ids[:, -1:] + more], dim=1)
        extra = torch.arange(length).expand(rows, length)
        return DecodingPass(
            self.first_slot,
            F.pad(self.input_ids, (0, tokens, 0, rows)),
            torch.cat([positions, extra]),
            F.pad(self.roles, (0, 0, 0, tokens, 0, rows), value=PADDING_DOC),
            self.wanted // self.shape[1] * length + self.wanted % self.shape[1],
            [*self.counts, *[0] * rows],
        )


class Forward(Protocol):
    """A model with keys and values of its own for every slot."""

    def run(self, step: DecodingPass) -> Iterator[tuple[range, Tensor]]:
        """Compute a pass; keep the keys and values of its clean tokens.

        A token sees the kept tokens of its slot that lie before the row's first one, and those of its own row, by
        `roles.visible`.

        Returns:
            Some rows at a time, in order, the logits [p, v] of their wanted tokens, so that those of all need not exist
            at once. Nothing on a rank without the head, or where none are wanted.
        """

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot `target` what slot `source` keeps of its first `length` tokens, in place of its own."""


class Peers(Protocol):
    """The other ranks of a model that several of them hold."""

    def agree(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape that this pass must have, given what this rank needs; (0, 0): nothing to do, on any rank."""

    def share(self, found: Tensor | None, count: int) -> Tensor:
        """What the ranks with the head have found, for all.

        Args:
            found: [P, k] float64; None on a rank without the head.
            count: P.
        """


class Alone:
    """The `Peers` of a rank that holds the whole model."""

    def agree(self, shape: tuple[int, int]) -> tuple[int, int]:
        """What is needed."""
        return shape

    def share(self, found: Tensor | None, count: int) -> Tensor:
        """`found` [P, k]."""
        assert found is not None and len(found) == count, (
            "a model that one rank holds has logits for every wanted token"
        )
        return found


def idle_pass() -> DecodingPass:
    """A pass of a rank that has nothing to decode while others have."""
    none = torch.zeros(1, 1, dtype=torch.int64)
    roles = torch.full((1, 1, 3), PADDING_DOC, dtype=torch.int32)
    return DecodingPass(0, none, none, roles, none[0, :0], [0])


def clean_pass(first_slot: int, runs: Sequence[tuple[int, Sequence[int]]], grid: BlockGrid) -> DecodingPass:
    """A pass that keeps clean tokens and reads no logits.

    Args:
        first_slot: of the first run.
        runs: for each slot the position of its first token here, and the ids from there on.
        grid: blocks of noisy and of clean tokens.
    """
    length = max(len(ids) for _, ids in runs)
    input_ids = torch.zeros(len(runs), length, dtype=torch.int64)
    for row, (_, ids) in enumerate(runs):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    starts, lengths = torch.tensor([start for start, _ in runs]), torch.tensor([len(ids) for _, ids in runs])
    positions, roles = places(starts, lengths, length, grid, torch.ones(len(runs), dtype=torch.bool))
    return DecodingPass(first_slot, input_ids, positions, roles, torch.zeros(0, dtype=torch.int64), [0] * len(runs))


def places(starts: Tensor, lengths: Tensor, width: int, grid: BlockGrid, is_clean: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens of some rows stand.

    Args:
        starts: [b] int64 position of each row's first token.
        lengths: [b] int64 tokens of each row; the rest is padding.
        width: n, tokens of the longest.
        grid: blocks of noisy and of clean tokens.
        is_clean: [b] bool, whether a row's tokens are clean ones.

    Returns:
        position_ids [b, n] int64 and roles [b, n, 3] int32.
    """
    offsets = torch.arange(width)
    positions = starts.unsqueeze(1) + offsets
    roles = torch.zeros(len(starts), width, 3, dtype=torch.int32)
    roles[..., DOC] = torch.where(offsets < lengths.unsqueeze(1), 0, PADDING_DOC)
    # Numbers count clean blocks; a noisy block has the number of the clean block that it begins with.
    clean, noisy = positions // grid.clean_block_size, positions // grid.block_size
    rows = is_clean.unsqueeze(1)
    roles[..., BLOCK] = torch.where(rows, clean, noisy * (grid.block_size // grid.clean_block_size))
    roles[..., VIEW] = torch.where(rows, CLEAN_VIEW, NOISY_VIEW)
    return positions, roles

"""The texts that are being written at a time, one a row, and their open blocks as tensors on the host.

A row fills the masks of its block, pass by pass. When there are none left, the block belongs to the text; the row's
next pass runs it once more as clean tokens, whose keys and values are kept, and the pass after that begins the next
block. With a shift that clean pass has found the next block's first token already, and counts as the first of its
denoising passes. A prompt of whole blocks then enters with its last block yet to be run.
A row whose text has ended is taken out, and the last row moves to its place, so that rows have no gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.acceptance import accept
from megatron_dllm.diffusion.credit import Trace
from megatron_dllm.diffusion.decoding_pass import BlockGrid, DecodingPass, places
from megatron_dllm.diffusion.generation import Text
from megatron_dllm.diffusion.prediction import Proposals


@dataclass(frozen=True)
class Move:
    """A text's row changes; `num_kept` of its tokens have keys and values."""

    source: int
    target: int
    num_kept: int


class DecodingBatch:
    """Rows of texts.

    Attributes:
        texts: of the rows.
    """

    def __init__(
        self,
        size: int,
        grid: BlockGrid,
        context_length: int,
        mask_token_id: int,
        eos_token_ids: tuple[int, ...],
        config: DecodingConfig,
        shift: bool = False,
    ) -> None:
        """Make a batch without texts.

        Args:
            size: most rows.
            grid: blocks of noisy and of clean tokens.
            context_length: where the last block of a text ends at the latest.
            mask_token_id: stands for an unknown token.
            eos_token_ids: any of these ends a text.
            config: what is accepted.
            shift: the slot before a token predicts it; else its own.
        """
        self.texts: list[Text] = []
        self._grid, self._block_size, self._context_length = grid, grid.block_size, context_length
        self._mask, self._eos, self._config, self._shift = mask_token_id, eos_token_ids, config, shift
        width = min(grid.block_size, context_length)
        self._ids = torch.zeros(size, width, dtype=torch.int64)
        self._is_masked = torch.zeros(size, width, dtype=torch.bool)
        self._passes = torch.zeros(size, width, dtype=torch.int64)
        self._starts = torch.zeros(size, dtype=torch.int64)
        self._lengths = torch.zeros(size, dtype=torch.int64)
        self._is_filled = torch.zeros(size, dtype=torch.bool)
        # Of the open blocks; None: no rule reads it.
        self._trace = Trace.empty(size, width, 0) if config.rule == "credit" else None

    def __len__(self) -> int:
        return len(self.texts)

    def num_kept(self, row: int) -> int:
        """Tokens of a text whose keys and values are kept."""
        return int(self._starts[row])

    def num_prefilled(self, text: Text) -> int:
        """Tokens of a prompt to keep before its text enters: its whole blocks, but for one with a token to predict."""
        return (len(text.ids) - self._shift) // self._block_size * self._block_size

    def add(self, text: Text) -> None:
        """Put a text, whose first blocks are kept (`num_prefilled`), into a row of its own."""
        self.texts.append(text)
        self._open_block(len(self.texts) - 1, self.num_prefilled(text))

    def _open_block(self, row: int, start: int) -> None:
        """Begin the block of a row at place `start`: what the text has of it, then masks."""
        ids = self.texts[row].ids
        length = min(start + self._block_size, self._context_length) - start
        known = len(ids) - start
        self._ids[row] = self._mask
        self._ids[row, :known] = torch.tensor(ids[start:], dtype=torch.int64)
        self._is_masked[row] = False
        self._is_masked[row, known:length] = True
        self._passes[row] = 0
        self._starts[row], self._lengths[row], self._is_filled[row] = start, length, known == length
        self._forget(row)

    def next_pass(self) -> DecodingPass:
        """The pass that takes every text a step further."""
        num_rows = len(self.texts)
        lengths = self._lengths[:num_rows]
        width = int(lengths.max())
        positions, roles = places(self._starts[:num_rows], lengths, width, self._grid, self._is_filled[:num_rows])
        is_wanted = self._slots_of(self._predicted(num_rows)[:, :width])
        return DecodingPass(
            first_slot=0,
            input_ids=self._ids[:num_rows, :width].clone(),
            position_ids=positions,
            roles=roles,
            wanted=is_wanted.flatten().nonzero().squeeze(1),
            counts=is_wanted.sum(dim=1).tolist(),
        )

    def _predicted(self, num_rows: int) -> Tensor:
        """[num_rows, n] bool, the tokens that the next pass predicts: the masked ones of each row's block.

        With a shift, place 0 of a row that runs its block as clean tokens stands for the token behind that block.
        """
        places = self._is_masked[:num_rows].clone()
        if self._shift:
            places[:, 0] |= self._is_filled[:num_rows]
        return places

    def _slots_of(self, places: Tensor) -> Tensor:
        """[b, n] bool, the slots that predict places [b, n] bool; with a shift the first place stands for the last."""
        if not self._shift:
            return places
        slots = pad(places[:, 1:], (0, 1))
        rows = places[:, 0].nonzero().squeeze(1)
        slots[rows, self._lengths[rows] - 1] = True
        return slots

    def trace(self, rows: Sequence[int]) -> Trace | None:
        """What earlier passes had first at the places that the next one predicts; None where no rule asks."""
        if self._trace is None:
            return None
        is_asked = torch.zeros_like(self._is_masked)
        is_asked[list(rows)] = self._predicted(len(self.texts))[list(rows)]
        return self._trace.take(is_asked)

    def take(self, found: Tensor) -> list[int]:
        """Take over what the pass has found.

        Args:
            found: [P, NUM_VALUES] float64 predictions of the wanted tokens (`Proposals.packed`).

        Returns:
            Rows whose text has ended.
        """
        num_rows = len(self.texts)
        is_masked = self._is_masked[:num_rows]
        was_filled = self._is_filled[:num_rows].nonzero().squeeze(1).tolist()
        proposals = Proposals.unpacked(found, self._predicted(num_rows))
        is_accepted = accept(proposals, is_masked, self._config)
        self._remember(proposals)
        self._passes[:num_rows][is_masked] += 1
        self._ids[:num_rows][is_accepted] = proposals.token_ids[is_accepted]
        is_masked &= ~is_accepted
        for row in was_filled:
            self._open_block(row, len(self.texts[row].ids))
            if self._shift:
                self._begin_with(row, int(proposals.token_ids[row, 0]))
            else:
                self.texts[row].num_commits += 1
        return [row for row in (~is_masked.any(dim=1)).nonzero().squeeze(1).tolist() if self._fill(row)]

    def _begin_with(self, row: int, token: int) -> None:
        """Put the first token of a row's new block in its place, found in the first of the block's passes."""
        self._ids[row, 0], self._is_masked[row, 0] = token, False
        self._passes[row] = 1

    def _remember(self, found: Proposals) -> None:
        """Keep what a pass had first for those that follow, [b, n] each of the rows with texts."""
        if self._trace is not None:
            free = (0, 0, 0, len(self._is_masked) - len(self.texts))
            self._trace = self._trace.grown(pad(found.first_ids, free), pad(found.first_confidence, free))

    def _forget(self, row: int) -> None:
        """Forget what passes had first in a row's block: what comes next belongs to another one."""
        if self._trace is not None:
            self._trace.probabilities[row] = 0.0

    def _fill(self, row: int) -> bool:
        """Hand the block of a row over to its text; returns whether that ends it."""
        text, length = self.texts[row], int(self._lengths[row])
        start, ids, passes = int(self._starts[row]), self._ids[row, :length], self._passes[row, :length]
        text.add_block(ids.tolist(), passes.tolist(), start, self._eos)
        self._is_filled[row] = True
        self._forget(row)
        return text.is_finished

    def remove(self, rows: Sequence[int]) -> list[Move]:
        """Take texts out; returns which of the others change their row, in order."""
        moves = []
        for row in sorted(rows, reverse=True):
            last = len(self.texts) - 1
            if row != last:
                moves.append(Move(last, row, self.num_kept(last)))
                self.texts[row] = self.texts[last]
                for state in self._states():
                    state[row] = state[last]
            self.texts.pop()
        return moves

    def _states(self) -> list[Tensor]:
        """All that is kept of the rows."""
        states = [self._ids, self._is_masked, self._passes, self._starts, self._lengths, self._is_filled]
        return states if self._trace is None else [*states, self._trace.token_ids, self._trace.probabilities]

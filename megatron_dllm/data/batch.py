"""The tensors of one micro-batch: what each of them counts, and all that follows from that.

The kind of every field is declared once, where the field is. Joining rows, taking one row or some tokens, moving to
a device and the digest of a row go through the kinds, so that a new field is one line here and none elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dllm.data.row import Row
from megatron_dllm.diffusion.roles import DOC, VIEW


class Kind(Enum):
    """What the first dimensions of a field count."""

    TOKEN = "token"  # [b, s, ...]
    TARGET = "target"  # [T]
    POSITION = "position"  # [T], one a target: an index into the flattened [b * s] tokens
    ROW = "row"  # [b]
    SEGMENT = "segment"  # [p]: the segments of all rows, in order
    TOTAL = "total"  # []: a sum over the micro-batch, which cannot be split


_TOKEN, _TARGET, _POSITION, _ROW, _SEGMENT, _TOTAL = ({"kind": kind, "is_digested": False} for kind in Kind)
_DIGESTED = {"is_digested": True}


def kind_of(item: Field[Any]) -> Kind:
    """The kind of a field of `Batch`."""
    kind: Kind = item.metadata["kind"]
    return kind


@dataclass(frozen=True)
class Batch:
    """One micro-batch. `b` rows of `s` tokens, `T` tokens that carry a loss (flattened over rows).

    Fields that are digested identify a row's content, and are hashed in the order in which they stand here: another
    order would change the fingerprint of every step.

    Attributes:
        sample_ids: [p] int64, sample ids of the segments in the micro-batch, in order.
        num_segments: [b] int64, how many of these segments lie in each row.
        segment_epochs: [p] int64, the pass over the corpus that each segment belongs to.
        segment_maskable: [p] int64, tokens of each segment that could have carried a loss, once for all its views.
        row_keys: [b] int64, a number that identifies the row's content wherever it is computed.
        input_ids: [b, s] int64, what the model reads: x_t in noisy views, x_0 in clean copies.
        position_ids: [b, s] int64, position inside the segment; every copy of a token shares it.
        roles: [b, s, 3] int32 (doc, block, view), see `diffusion.roles`.
        is_masked: [b, s] bool, noisy tokens replaced by the mask token.
        target_positions: [T] int64, index into the flattened [b * s] tokens whose output carries a loss.
        target_ids: [T] int64, the token to be predicted there.
        target_t: [T] fp32, noise level of the target's block (0 in AR).
        loss_weights: [T] fp32, e.g. 1/t for the ELBO.
        is_fill: [T] bool, whether the target is an end-of-text token behind an answer (see `data.noisy_blocks`).
        is_ar_target: [T] bool, whether the target counts in an AR loss beside the diffusion loss, see
            `training.balancing`; false in AR, which has no other loss.
        num_maskable: [] int64, tokens that could have carried a loss: the denominator.
        num_answers: [] int64, answers that could have carried a loss, once for each view; of text, its segments.
        num_ar_maskable: [] int64, tokens that clean copies and AR rows beside noisy ones could have predicted: what the
            AR loss of such a stage is a mean over; 0 in AR, whose targets `num_maskable` counts.
        num_document_tokens: [] int64, tokens of the corpus consumed, and of the fill (each once, whatever its copies).
        num_forward_tokens: [] int64, tokens the model sees, padding not counted.
    """

    sample_ids: Tensor = field(metadata=_SEGMENT | _DIGESTED)
    num_segments: Tensor = field(metadata=_ROW)
    segment_epochs: Tensor = field(metadata=_SEGMENT)
    segment_maskable: Tensor = field(metadata=_SEGMENT)
    row_keys: Tensor = field(metadata=_ROW | _DIGESTED)
    input_ids: Tensor = field(metadata=_TOKEN | _DIGESTED)
    position_ids: Tensor = field(metadata=_TOKEN)
    roles: Tensor = field(metadata=_TOKEN)
    is_masked: Tensor = field(metadata=_TOKEN | _DIGESTED)
    target_positions: Tensor = field(metadata=_POSITION | _DIGESTED)
    target_ids: Tensor = field(metadata=_TARGET | _DIGESTED)
    target_t: Tensor = field(metadata=_TARGET | _DIGESTED)
    loss_weights: Tensor = field(metadata=_TARGET | _DIGESTED)
    is_fill: Tensor = field(metadata=_TARGET)
    is_ar_target: Tensor = field(metadata=_TARGET)
    num_maskable: Tensor = field(metadata=_TOTAL)
    num_answers: Tensor = field(metadata=_TOTAL)
    num_ar_maskable: Tensor = field(metadata=_TOTAL)
    num_document_tokens: Tensor = field(metadata=_TOTAL)
    num_forward_tokens: Tensor = field(metadata=_TOTAL)

    @property
    def target_segments(self) -> Tensor:
        """[T] int64, the segment of each target: an index into `sample_ids`, for sums over documents.

        It is the same on every context-parallel rank, so sums over segments can be added over the group.
        """
        first = torch.cumsum(self.num_segments, 0) - self.num_segments
        row = self.target_positions // self.input_ids.shape[1]
        return first[row] + self._target_roles[:, DOC]

    @property
    def target_views(self) -> Tensor:
        """[T] int64, the view each target's slot lies in: 1..K, beyond that for further copies of a block, or 0.

        It is 0 in AR, and where a clean slot predicts for all views (see `data.row`).
        """
        return self._target_roles[:, VIEW].long()

    @property
    def _target_roles(self) -> Tensor:
        return self.roles.flatten(0, 1)[self.target_positions]

    def to(self, device: torch.device | str) -> Batch:
        """Copy every tensor to `device` (asynchronously from pinned memory)."""
        return self._map(lambda _, value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy every tensor to page-locked memory; a DataLoader calls it."""
        return self._map(lambda _, value: value.pin_memory())

    def take_tokens(self, tokens: Tensor) -> Batch:
        """Some tokens of every row, and the targets among them; what is not per token or target stays the whole's.

        Args:
            tokens: [b, n] int64 places in the row, none of them twice.

        Returns:
            A batch of [b, n] tokens, whose target positions count among these.
        """
        num_rows, length = self.input_ids.shape
        flat = (tokens + torch.arange(num_rows).unsqueeze(-1) * length).flatten()
        place = torch.full((num_rows * length,), -1, dtype=torch.int64)
        place[flat] = torch.arange(len(flat))
        local = place[self.target_positions]
        is_taken = local >= 0

        def take(kind: Kind, value: Tensor) -> Tensor:
            if kind is Kind.TOKEN:
                return value.flatten(0, 1)[flat].view(*tokens.shape, *value.shape[2:])
            if kind is Kind.POSITION:
                return local[is_taken]
            return value[is_taken] if kind is Kind.TARGET else value

        return self._map(take)

    def split_rows(self) -> list[Batch]:
        """One batch for each row. Totals (num_maskable, ...) stay those of the whole."""
        length = self.input_ids.shape[1]
        segments = torch.split(torch.arange(len(self.sample_ids)), self.num_segments.tolist())
        row_of_target = self.target_positions // length

        def take(row: int) -> Callable[[Kind, Tensor], Tensor]:
            is_mine, one_row = row_of_target == row, slice(row, row + 1)
            part: dict[Kind, Tensor | slice] = {
                Kind.TOKEN: one_row,
                Kind.ROW: one_row,
                Kind.SEGMENT: segments[row],
                Kind.TARGET: is_mine,
            }

            def take_part(kind: Kind, value: Tensor) -> Tensor:
                if kind is Kind.POSITION:
                    return value[is_mine] - row * length
                return value if kind is Kind.TOTAL else value[part[kind]]

            return take_part

        return [self._map(take(row)) for row in range(len(self.num_segments))]

    def digested(self) -> list[Tensor]:
        """What identifies the content, in the order in which it is hashed."""
        return [getattr(self, item.name) for item in fields(self) if item.metadata["is_digested"]]

    def _map(self, function: Callable[[Kind, Tensor], Tensor]) -> Batch:
        return replace(self, **{f.name: function(kind_of(f), getattr(self, f.name)) for f in fields(self)})


def collate(rows: Sequence[Row]) -> Batch:
    """Stack rows of one length into a micro-batch; target positions then count over all of them."""
    row_length = len(rows[0].input_ids)

    def join(name: str, kind: Kind) -> Tensor:
        values = [getattr(row, name) for row in rows]
        if kind is Kind.TOTAL:
            return torch.tensor(sum(values))
        if kind is Kind.POSITION:
            values = [value + index * row_length for index, value in enumerate(values)]
        return torch.from_numpy(np.stack(values) if kind is Kind.TOKEN else np.concatenate(values))

    return Batch(**{item.name: join(item.name, kind_of(item)) for item in fields(Batch)})

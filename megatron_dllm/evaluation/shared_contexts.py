"""Choices of a question in one row segment: the context's clean copy once, and noisy blocks of every choice beside it.

A noisy block sees the clean blocks before it and itself, and no other view. So choices that end in the block where they
begin are further views of one document, which costs their contexts once. A context of 100 tokens, blocks of 32, four
choices, 8 views of each:

    apart       4 x (8 x 32 + 96) = 1408 tokens
    together    4 x 8 x 32 + 96   = 1120 tokens; with one view, as letters take, 224 instead of 512

A choice that goes on into the next block needs clean copies of its own tokens, and stays alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.batch import Batch, Kind, kind_of
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import DOCUMENT, RowPlan
from megatron_dllm.data.row import Row
from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, PADDING_DOC, VIEW
from megatron_dllm.evaluation.continuations import Continuation

IntArray = NDArray[np.int64]
_KINDS = {item.name: kind_of(item) for item in fields(Batch)}


def group_choices(
    asked: Sequence[Continuation], block_size: int, fill: str, context_length: int, num_views: int, row_length: int
) -> dict[int, list[tuple[int, ...]]]:
    """Which continuations are scored in one segment, by how many they are; every one is in one group.

    Args:
        asked: that fit the window.
        block_size: of the grid.
        fill: see `config.likelihood`.
        context_length: where the last block ends at the latest.
        num_views: noisy views of each.
        row_length: tokens that a group takes at the most, unless one choice takes more.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    for place, item in enumerate(asked):
        num_scored = item.num_scored(block_size, fill, context_length)
        # Without fill, the block of a shorter choice is shorter.
        length = len(item.tokens) if fill == "none" else 0
        alike[(item.context, length) if len(num_scored) == 1 else place].append(place)
    groups: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for places in alike.values():
        num_clean = len(asked[places[0]].context) // block_size * block_size
        most = max((row_length - num_clean) // (num_views * block_size), 1)
        for start in range(0, len(places), most):
            part = tuple(places[start : start + most])
            groups[len(part)].append(part)
    return dict(sorted(groups.items()))


@dataclass(frozen=True, kw_only=True)
class SharedContexts(RowDataset):
    """Rows of documents that stand for several choices each; their geometry has the views of all of these.

    Attributes:
        alone: builds a row of one choice, whose documents are all choices.
        members: the choices of each document, equally many.
        lengths: [d] int64 tokens of every choice with its context and fill.
    """

    alone: RowDataset
    members: Sequence[Sequence[int]]
    lengths: IntArray

    @classmethod
    def of(
        cls, together: RowDataset, alone: RowDataset, members: Sequence[Sequence[int]], lengths: IntArray
    ) -> SharedContexts:
        """Rows for the documents of `together`, each of which is the first of its choices.

        Args:
            together: what has the views of all choices; it builds rows of padding alone.
            alone: see the class.
            members: see the class.
            lengths: see the class, [d] int64.
        """
        values = {item.name: getattr(together, item.name) for item in fields(together)}
        return cls(**values, alone=alone, members=members, lengths=lengths)

    def __getitem__(self, plan: RowPlan) -> Row:
        """Build a row of the plan's documents: that of each choice alone, put together."""
        padding = super().__getitem__(replace(plan, segments=plan.segments[:0]))
        documents = plan.segments[:, DOCUMENT].tolist()
        choices = [[self._row(plan, choice) for choice in self.members[document]] for document in documents]
        if not choices:
            return padding
        num_views = self.alone.geometry.num_views
        parts = [part for number, rows in enumerate(choices) for part in _parts(rows, number, num_views)]
        row = _joined(padding, parts, [rows[0] for rows in choices])
        sample_ids = np.array([self.source.sample_id(document, 0) for document in documents], dtype=np.int64)
        return replace(row, sample_ids=sample_ids)

    def _row(self, plan: RowPlan, choice: int) -> Row:
        segment = np.array([[choice, 0, self.lengths[choice], 0]], dtype=np.int64)
        return self.alone[RowPlan(segment, plan.epoch)]


def _parts(rows: Sequence[Row], number: int, num_views: int) -> Iterator[Row]:
    """Noisy copies of every choice of the document with this number in the row, then the clean copy of one.

    Args:
        rows: of each choice alone.
        number: of the document.
        num_views: of each choice.
    """
    for choice, row in enumerate(rows):
        yield _taken(row, row.roles[:, VIEW] > CLEAN_VIEW, number, choice * num_views)
    yield _taken(rows[0], rows[0].roles[:, VIEW] == CLEAN_VIEW, number, 0)


def _taken(row: Row, is_taken: NDArray[np.bool_], document: int, num_views_before: int) -> Row:
    """Some tokens of a row and the targets among them, in a document and in views of another number.

    Args:
        row: of one document.
        is_taken: [s] which tokens; padding is none of them in any case.
        document: its number in the row that the tokens go to.
        num_views_before: what is added to their views.
    """
    slots = np.flatnonzero(is_taken & (row.roles[:, DOC] != PADDING_DOC))
    place = np.full(len(row.input_ids), -1)
    place[slots] = np.arange(len(slots))
    local = place[row.target_positions]

    def take(kind: Kind, value: Any) -> Any:
        if kind is Kind.TOKEN:
            return value[slots]
        if kind is Kind.POSITION:
            return local[local >= 0]
        return value[local >= 0] if kind is Kind.TARGET else value

    part = replace(row, **{name: take(kind, getattr(row, name)) for name, kind in _KINDS.items()})
    return replace(part, roles=part.roles + np.array([document, 0, num_views_before], dtype=np.int32))


def _joined(padding: Row, parts: Sequence[Row], documents: Sequence[Row]) -> Row:
    """A row of parts, one behind the other. Its totals, which no score reads, count a choice of each document.

    Args:
        padding: a row of nothing else.
        parts: of its documents.
        documents: a choice of each.
    """
    starts = np.cumsum([0, *(len(part.input_ids) for part in parts)])
    assert starts[-1] <= len(padding.input_ids), f"parts of {starts[-1]} tokens in a row of {len(padding.input_ids)}"

    def join(name: str, kind: Kind) -> Any:
        values = [getattr(part, name) for part in parts]
        if kind is Kind.TOKEN:
            return np.concatenate([*values, getattr(padding, name)[starts[-1] :]])
        if kind is Kind.POSITION:
            return np.concatenate([value + start for value, start in zip(values, starts[:-1], strict=True)])
        if kind is Kind.TARGET:
            return np.concatenate(values)
        of_documents = [getattr(row, name) for row in documents]
        if kind is Kind.SEGMENT:
            return np.concatenate(of_documents)
        return sum(of_documents) if kind is Kind.TOTAL else of_documents[0]

    row = replace(padding, **{name: join(name, kind) for name, kind in _KINDS.items()})
    return replace(row, num_segments=np.array([len(documents)]), num_forward_tokens=int(starts[-1]))

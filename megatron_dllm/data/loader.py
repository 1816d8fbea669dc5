"""From the sequence of rows to the micro-batches of one data-parallel rank.

Row i of a global batch belongs to micro-batch j of rank r where i lies in [(j * dp + r) * b, ... + b),
b rows a micro-batch: the global batch is the same set of rows whatever the layout is. Every rank plans
all rows, which is cheap, and reads and builds only its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_dllm.data.batch import Batch, collate
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import LENGTH, RowPlan, row_document_tokens, row_forward_tokens
from megatron_dllm.data.row import Row, build_row
from megatron_dllm.data.row_tokens import RowContent
from megatron_dllm.data.source import Documents
from megatron_dllm.data.spans import segment_spans
from megatron_dllm.diffusion.noise_spec import NoiseSpec


class RowSequence(Protocol):
    """A global sequence of rows, of one corpus or of a blend, from any position on."""

    def next(self, geometry: RowGeometry) -> RowPlan:
        """The next row, under `geometry`."""

    def state_dict(self) -> dict[str, Any]:
        """The position as plain numbers, fit for JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last row before `state_dict` was called."""

    def copy(self) -> RowSequence:
        """An independent sequence at the same position."""


@dataclass(frozen=True)
class RowDataset(Dataset[Row]):
    """Builds rows from their plans.

    Attributes:
        source: that the plans' documents belong to.
        geometry: of the rows.
        noise: how tokens are masked; None for AR.
        seed: of the noise.
        mask_token_id: replaces masked tokens.
        pad_token_id: fills rows.
        eos_token_id: fills the last blocks of turns; needed where the geometry asks for it.
        num_sibling_bits: samples whose ids differ in so many of the lowest bits alone have the same noise.
    """

    source: Documents
    geometry: RowGeometry
    noise: NoiseSpec | None
    seed: int
    mask_token_id: int
    pad_token_id: int
    eos_token_id: int | None = None
    num_sibling_bits: int = 0

    def geometry_of(self, plan: RowPlan) -> RowGeometry:
        """The geometry that a row was planned under."""
        return self.geometry.ar_rows() if plan.is_ar else self.geometry

    def __getitem__(self, plan: RowPlan) -> Row:
        """Read the tokens of a plan's segments and build its row."""
        segments = plan.segments.tolist()
        tokens = [self.source.read(document, offset, length) for document, offset, length, _ in segments]
        sample_ids = [self.source.sample_id(document, offset) for document, offset, _, _ in segments]
        content = RowContent(
            clean_ids=np.concatenate([np.zeros(0, np.int64), *tokens]),
            sample_ids=np.array(sample_ids, dtype=np.int64),
            spans=segment_spans(self.source.spans, plan.segments),
            num_sibling_bits=self.num_sibling_bits,
        )
        return build_row(
            plan,
            content,
            self.geometry_of(plan),
            None if plan.is_ar else self.noise,
            seed=self.seed,
            mask_token_id=self.mask_token_id,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_id,
        )


@dataclass(frozen=True)
class GlobalStep:
    """One rank's share of a global batch.

    Attributes:
        micro_batches: of this rank, in order.
        stream_state: position of the row sequence behind this step, for the checkpoint.
        num_document_tokens: tokens of the corpus in the whole global batch, over all ranks.
        num_forward_tokens: tokens the model sees for them, padding apart.
    """

    micro_batches: list[Batch]
    stream_state: dict[str, Any]
    num_document_tokens: int
    num_forward_tokens: int


class BatchLoader:
    """Iterates over global steps of one geometry.

    With workers, rows are built ahead of time; `stream` still stands exactly behind the step that was
    yielded last, so a checkpoint or the next stage's loader may use it at any time.

    Args:
        dataset: builds the rows.
        stream: where to begin; advanced in place.
        global_batch_size: rows a step, over all ranks.
        micro_batch_size: rows a micro-batch.
        data_parallel_rank: this rank.
        data_parallel_size: ranks that read different rows.
        num_workers: processes that build rows; 0: this one does.
        num_rows: end after so many rows (validation); rows of padding complete the last step. None: no end.
        progress: the share of the stage that is done so many document tokens behind `stream`; None: all of it.
    """

    def __init__(
        self,
        dataset: RowDataset,
        stream: RowSequence,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        num_workers: int = 0,
        num_rows: int | None = None,
        progress: Callable[[int], float] | None = None,
    ) -> None:
        assert global_batch_size > 0 and global_batch_size % (micro_batch_size * data_parallel_size) == 0, (
            f"global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size x data parallel size "
            f"({micro_batch_size} x {data_parallel_size})"
        )
        self._dataset, self._stream = dataset, stream
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._num_workers, self._num_rows = num_workers, num_rows
        self._progress = progress or (lambda _: 1.0)
        self._num_micro_batches = global_batch_size // (micro_batch_size * data_parallel_size)

    @property
    def num_steps(self) -> int | None:
        """Steps until it ends; None: it does not."""
        return None if self._num_rows is None else -(-self._num_rows // self._global_batch_size)

    def __iter__(self) -> Iterator[GlobalStep]:
        """Yield steps from the stream's position on."""
        planned: deque[tuple[dict[str, Any], int, int]] = deque()
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._plans(self._stream.copy(), planned),
            collate_fn=collate,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: the default one would draw from the run's random state.
            generator=torch.Generator(),
        )
        micro_batches: list[Batch] = []
        for batch in loader:
            micro_batches.append(batch)
            if len(micro_batches) == self._num_micro_batches:
                state, document_tokens, forward_tokens = planned.popleft()
                self._stream.load_state_dict(state)
                yield GlobalStep(micro_batches, state, document_tokens, forward_tokens)
                micro_batches = []

    def _plans(self, stream: RowSequence, planned: deque[tuple[dict[str, Any], int, int]]) -> Iterator[list[RowPlan]]:
        """This rank's micro-batches of plans; state and tokens of every step are queued before its first one."""
        rows_left, done = self._num_rows, 0
        padding = RowPlan(segments=np.zeros((0, 4), dtype=np.int64), epoch=0)
        while rows_left is None or rows_left > 0:
            num_rows = self._global_batch_size if rows_left is None else min(rows_left, self._global_batch_size)
            progress = self._progress(done)
            rows = [replace(stream.next(self._dataset.geometry), progress=progress) for _ in range(num_rows)]
            rows += [padding] * (self._global_batch_size - num_rows)
            counts = np.array([self._count(row) for row in rows])
            document_tokens, forward_tokens = counts.sum(axis=0).tolist()
            planned.append((stream.state_dict(), document_tokens, forward_tokens))
            done += document_tokens
            for index in range(self._num_micro_batches):
                first = (index * self._size + self._rank) * self._micro_batch_size
                yield rows[first : first + self._micro_batch_size]
            rows_left = None if rows_left is None else rows_left - num_rows

    def _count(self, plan: RowPlan) -> tuple[int, int]:
        """Document tokens and forward tokens of a row."""
        lengths, geometry = plan.segments[:, LENGTH], self._dataset.geometry_of(plan)
        spans = segment_spans(self._dataset.source.spans, plan.segments)
        return row_document_tokens(geometry, lengths, spans), row_forward_tokens(geometry, lengths, spans)

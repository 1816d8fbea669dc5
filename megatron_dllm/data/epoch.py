"""What one pass over a source comes to: counted from lengths and spans, before a run starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dllm.data.costs import document_tokens, segment_costs
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import DOCUMENT, LENGTH, trainable_segments
from megatron_dllm.data.source import Source
from megatron_dllm.data.spans import segment_spans

# Documents counted at a time: some megabytes of memory.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Epoch:
    """One pass over the documents of a source.

    Attributes:
        num_tokens: document tokens of its rows, those of the fill included.
        largest_cost: most tokens that a segment takes in a row, with all its copies; 0 where nothing carries a loss.
        costliest: the document that the segment belongs to.
    """

    num_tokens: int
    largest_cost: int
    costliest: int


def measure_epoch(source: Source, geometry: RowGeometry) -> Epoch:
    """Count one pass over the documents, about a second for a million of them.

    Raises:
        ValueError: the spans are damaged.
    """
    lengths, spans = source.document_lengths, source.spans
    num_tokens, largest, costliest = 0, 0, 0
    for first in range(0, len(lengths), _CHUNK):
        numbers = np.arange(first, min(first + _CHUNK, len(lengths)))
        whole = np.zeros((len(numbers), 4), dtype=np.int64)
        whole[:, DOCUMENT], whole[:, LENGTH] = numbers, lengths[numbers]
        if spans is not None:
            spans.take(numbers).check(numbers, whole[:, LENGTH])
        segments = trainable_segments(whole, geometry.context_length, spans)
        if not len(segments):
            continue
        of_segments = segment_spans(spans, segments)
        num_tokens += int(document_tokens(geometry, segments[:, LENGTH], of_segments).sum())
        costs = segment_costs(geometry, segments[:, LENGTH], of_segments)
        if costs.max() > largest:
            largest, costliest = int(costs.max()), int(segments[np.argmax(costs), DOCUMENT])
    return Epoch(num_tokens, largest, costliest)


def check_chats(source: Source, geometry: RowGeometry, epoch: Epoch, stage: str) -> None:
    """Refuse documents that a stage cannot train as chats.

    Args:
        source: of the run.
        geometry: of the stage.
        epoch: what one pass over the source comes to under this geometry.
        stage: its name in messages.

    Raises:
        ValueError: naming what is wrong, and what to do.
    """
    if source.spans is None:
        raise ValueError(
            f"{stage}.sft needs chats, and corpus {source.name} is plain text, without spans; tokenize chats with "
            f"--kind chat, or set {stage}.sft=null."
        )
    if epoch.largest_cost == 0:
        raise ValueError(
            f"corpus {source.name} ({len(source.document_lengths)} documents) must hold a token that may carry a loss; "
            "tokenize chats with answers in them."
        )
    longest = int(np.argmax(source.document_lengths))
    if source.document_lengths[longest] > geometry.context_length:
        raise ValueError(
            f"document {longest} of corpus {source.name} ({int(source.document_lengths[longest])} tokens) must not be "
            f"longer than schedule.context_length ({geometry.context_length}): it would be cut into answers without "
            f"their prompts; tokenize with --max_length {geometry.context_length}, or raise context_length."
        )
    check_fits_a_row(source, geometry, epoch, stage)


def check_fits_a_row(source: Source, geometry: RowGeometry, epoch: Epoch, what: str) -> None:
    """Refuse chats that take more tokens than a row has, with the noisy blocks of their turns.

    Args:
        source: of the chats.
        geometry: of the rows.
        epoch: what one pass over the source comes to under this geometry.
        what: has these rows, for the message.

    Raises:
        ValueError: naming the document, and what to do.
    """
    if epoch.largest_cost > geometry.row_length:
        raise ValueError(
            f"schedule.row_length ({geometry.row_length}) must hold document {epoch.costliest} of corpus "
            f"{source.name}, which takes {epoch.largest_cost} tokens in {what} with the noisy blocks of its turns; "
            f"raise row_length to {epoch.largest_cost}."
        )

"""One pass over a source, counted before the run, is what its rows hold; documents that no stage can train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from megatron_dllm.data.epoch import check_chats, measure_epoch
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import LENGTH, RowStream, row_document_tokens, row_forward_tokens
from megatron_dllm.data.spans import MASKABLE, MASKED, Spans, segment_spans
from tests.unit.data.random_spans import random_spans

GEOMETRY = RowGeometry("block_diffusion", 4, 32, 96, 2, fill="eos", turn_boundary="split_views")


@dataclass(frozen=True)
class Chats:
    document_lengths: Any
    spans: Spans | None
    name: str = "chats"


@pytest.mark.parametrize("has_spans", [True, False])
def test_an_epoch_is_what_the_rows_of_one_hold(has_spans: bool) -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 100)  # some longer than the context
    spans = random_spans(lengths.tolist(), 1) if has_spans else None
    geometry = GEOMETRY if has_spans else RowGeometry("block_diffusion", 4, 32, 96, 2)
    stream = RowStream(lengths, 3, 16, spans=spans)
    num_tokens, costs = 0, []
    while (plan := stream.next(geometry)).epoch == 0:
        of_row = segment_spans(spans, plan.segments)
        num_tokens += row_document_tokens(geometry, plan.segments[:, LENGTH], of_row)
        for place in range(len(plan.segments)):
            own = None if of_row is None else of_row.take(np.array([place]))
            costs.append((row_forward_tokens(geometry, plan.segments[[place], LENGTH], own), plan.segments[place, 0]))
    epoch = measure_epoch(Chats(lengths, spans), geometry)
    assert epoch.num_tokens == num_tokens and epoch.largest_cost == max(costs)[0]
    assert (epoch.largest_cost, epoch.costliest) in costs


def check(lengths: list[int], spans: list[list[tuple[int, int, int]]] | None) -> None:
    source = Chats(np.array(lengths), None if spans is None else Spans.of_lists(spans))
    geometry = GEOMETRY if spans is not None else RowGeometry("block_diffusion", 4, 32, 96, 2)
    check_chats(source, geometry, measure_epoch(source, geometry), "schedule.stages.sft")


def test_chats_that_fit_are_accepted() -> None:
    check([32, 10], [[(20, 32, MASKABLE)], [(0, 10, MASKABLE)]])


@pytest.mark.parametrize(
    ("lengths", "spans", "message"),
    [
        ([32], None, r"schedule.stages.sft.sft needs chats, and corpus chats is plain text.*--kind chat"),
        ([9, 5], [[], [(1, 3, MASKED)]], r"corpus chats \(2 documents\) must hold a token that may carry a loss"),
        (
            [9, 33],
            [[(1, 3, MASKABLE)]] * 2,
            r"document 1 of corpus chats \(33 tokens\).*context_length \(32\).*--max_length 32",
        ),
        # 16 answers of one token, two in a block: 8 tokens of both views each.
        (
            [32],
            [[(start, start + 1, MASKABLE) for start in range(0, 32, 2)]],
            r"row_length \(96\) must hold document 0 of corpus chats, which takes 156 tokens.*raise row_length to 156",
        ),
    ],
)
def test_documents_that_cannot_be_trained_as_chats_are_refused(
    lengths: list[int], spans: list[list[tuple[int, int, int]]] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(lengths, spans)

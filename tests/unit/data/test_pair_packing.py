"""Pairs in rows: whole in every global batch, in bounds, complete, and continued exactly from any position."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_dllm.data.blend_stream import BlendStream
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import DOCUMENT, LENGTH, ORDINAL, RowPlan, RowStream, estimate_fill, row_forward_tokens
from megatron_dllm.data.pair_packing import assign_pair_rows
from megatron_dllm.data.spans import MASKABLE, Spans, segment_spans
from tests.unit.data.made_sources import MadeSource

ROWS = 4
GEOMETRIES = [
    RowGeometry("block_diffusion", 4, 16, 64, 1, fill="eos", turn_boundary="split_views", rows_of_pairs=ROWS),
    RowGeometry("block_diffusion", 4, 16, 80, 3, fill="eos", turn_boundary="split_views", rows_of_pairs=ROWS),
    RowGeometry("block_diffusion", 8, 16, 64, 2, prune_clean=False, rows_of_pairs=2),
]
IDS = ["one view", "three views", "nothing pruned"]


def pairs_of(num_pairs: int, seed: int = 0) -> tuple[np.ndarray, Spans]:
    """Lengths and spans of made pairs: a prompt of 1 to 8 tokens and two answers of 1 to 8."""
    draw = np.random.default_rng(seed)
    prompts, answers = draw.integers(1, 9, num_pairs), draw.integers(1, 9, 2 * num_pairs)
    lengths = np.repeat(prompts, 2) + answers
    starts = np.repeat(prompts, 2).tolist()
    return lengths, Spans.of_lists([[(s, n, MASKABLE)] for s, n in zip(starts, lengths.tolist(), strict=True)])


def stream_of(num_pairs: int, chunk: int = 11) -> RowStream:
    lengths, spans = pairs_of(num_pairs)
    return RowStream(lengths, 5, chunk, spans=spans, is_paired=True)


def batches_of(stream: RowStream, geometry: RowGeometry) -> list[list[RowPlan]]:
    """The global batches of the first epoch."""
    batches = []
    while (batch := [stream.next(geometry) for _ in range(geometry.rows_of_pairs or 1)])[0].epoch == 0:
        batches.append(batch)
    return batches


def documents_of(batch: list[RowPlan]) -> list[int]:
    return sorted(int(document) for plan in batch for document in plan.segments[:, DOCUMENT])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=IDS)
def test_a_global_batch_holds_whole_pairs(geometry: RowGeometry) -> None:
    batches = batches_of(stream_of(40), geometry)
    for batch in batches:
        documents = documents_of(batch)
        assert documents, "a batch without a pair"
        assert [document ^ 1 for document in documents[::2]] == documents[1::2], "half a pair"
    assert sorted(document for batch in batches for document in documents_of(batch)) == list(range(80))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=IDS)
def test_rows_hold_what_their_sides_cost(geometry: RowGeometry) -> None:
    _, spans = pairs_of(40)
    num_apart = 0
    for batch in batches_of(stream_of(40), geometry):
        for plan in batch:
            of_segments = segment_spans(spans, plan.segments)
            assert row_forward_tokens(geometry, plan.segments[:, LENGTH], of_segments) <= geometry.row_length
            documents = plan.segments[:, DOCUMENT].tolist()
            num_apart += sum(document ^ 1 not in documents for document in documents)
    assert num_apart > 0, "both sides of every pair lie in one row, so nothing was shown"


def test_a_pair_goes_to_the_first_batch_that_holds_both_of_its_sides() -> None:
    # In AR a side costs its tokens. The last pair fits into what is left of the first batch.
    geometry = RowGeometry("ar", 1, 16, 16, 0, rows_of_pairs=2)
    costs = np.array([9, 5, 4, 7, 3, 3, 2, 5])
    assert assign_pair_rows(geometry, costs).tolist() == [0, 0, 1, 1, 2, 2, 0, 1]


def test_pairs_are_shuffled_as_one_and_anew_in_every_epoch() -> None:
    stream, geometry = stream_of(40), GEOMETRIES[0]
    epochs: dict[int, list[np.ndarray]] = {}
    while (plan := stream.next(geometry)).epoch < 2:
        epochs.setdefault(plan.epoch, []).append(plan.segments)
    orders = []
    for parts in epochs.values():
        segments = np.concatenate(parts)
        documents = segments[np.argsort(segments[:, ORDINAL]), DOCUMENT]
        assert documents[::2].tolist() == (documents[1::2] - 1).tolist(), "the sides follow each other"
        orders.append((documents[::2] // 2).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


@pytest.mark.parametrize("num_batches", [0, 1, 2, 5])
def test_a_saved_position_continues_exactly(num_batches: int) -> None:
    geometry = GEOMETRIES[0]
    unbroken, stream = stream_of(40), stream_of(40)
    for _ in range(num_batches * ROWS):
        unbroken.next(geometry), stream.next(geometry)
    resumed = stream_of(40)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    for _ in range(30 * ROWS):
        assert np.array_equal(resumed.next(geometry).segments, unbroken.next(geometry).segments)


def test_a_stage_with_other_rows_goes_on_with_whole_pairs_in_mid_chunk() -> None:
    stream = stream_of(40, chunk=40)
    seen = [documents_of([stream.next(GEOMETRIES[0]) for _ in range(ROWS)])]
    other = replace(GEOMETRIES[1], rows_of_pairs=3)
    seen += [documents_of([stream.next(other) for _ in range(3)]) for _ in range(4)]
    assert all([document ^ 1 for document in batch[::2]] == batch[1::2] for batch in seen)
    together = [document for batch in seen for document in batch]
    assert len(set(together)) == len(together)


def test_pairs_lie_whole_in_the_batches_of_a_blend_too() -> None:
    pairs = MadeSource("pairs", token=5, num_documents=30, mean=6, answers=True, is_paired=True)
    stream = BlendStream([MadeSource("web", 3, 20), pairs], seed=1, chunk=8)
    stream.use({pairs.fingerprint: 1.0})
    geometry = RowGeometry("block_diffusion", 4, 12, 48, 1, rows_of_pairs=2)
    for _ in range(8):
        documents = documents_of([stream.next(geometry) for _ in range(2)])
        assert documents and [document ^ 1 for document in documents[::2]] == documents[1::2]


def test_a_batch_of_a_blend_of_pairs_is_of_one_corpus() -> None:
    """Also behind a position that was saved; the shares are within one batch of the weights."""
    sources = [
        MadeSource(name, token, num_documents=400, mean=6, answers=True, is_paired=True)
        for name, token in (("a", 5), ("b", 6))
    ]
    geometry = RowGeometry("block_diffusion", 4, 12, 48, 1, rows_of_pairs=3)
    stream = BlendStream(sources, seed=1, chunk=64)
    stream.use({"of a": 0.75, "of b": 0.25})
    tokens, largest = [0, 0], 0
    for _ in range(24):
        stream = stream.copy()
        batch = [stream.next(geometry) for _ in range(3)]
        documents = documents_of(batch)
        assert documents and [document ^ 1 for document in documents[::2]] == documents[1::2], "half a pair"
        (number,) = {document >> 40 for document in documents}
        num_tokens = sum(int(plan.segments[:, LENGTH].sum()) for plan in batch)
        tokens[number], largest = tokens[number] + num_tokens, max(largest, num_tokens)
    assert abs(tokens[1] - 0.25 * sum(tokens)) <= largest and min(tokens) > 0


def test_the_estimate_counts_the_empty_rows() -> None:
    lengths, spans = pairs_of(3)
    geometry = replace(GEOMETRIES[0], rows_of_pairs=50)
    fill = estimate_fill(lengths, geometry, seed=5, chunk=100, spans=spans, is_paired=True)
    assert fill.forward_tokens + fill.padding_tokens == geometry.row_length
    assert fill.forward_tokens < 0.1 * geometry.row_length


def test_a_view_more_costs_its_noisy_blocks_and_no_clean_copy() -> None:
    lengths, spans = pairs_of(40)
    tokens = []
    for num_views in (1, 2, 3, 8):
        geometry = replace(GEOMETRIES[0], num_views=num_views, row_length=16 * (num_views + 1))
        batches = batches_of(stream_of(40), geometry)
        plans = [plan for batch in batches for plan in batch]
        tokens.append(
            sum(
                row_forward_tokens(geometry, plan.segments[:, LENGTH], segment_spans(spans, plan.segments))
                for plan in plans
            )
        )
    # An answer's blocks, the first from its beginning in the document, are filled to their ends.
    starts = spans.table[:, 0]
    expected_noisy = int((-(-lengths // 4) * 4 - starts // 4 * 4).sum())
    assert [count - tokens[0] for count in tokens] == [0, expected_noisy, 2 * expected_noisy, 7 * expected_noisy]
    assert tokens[0] - expected_noisy == int((((lengths - 1) // 4) * 4).sum()), "one clean copy, but for the last block"

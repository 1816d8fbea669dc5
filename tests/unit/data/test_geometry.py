"""What a segment costs, in cases worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_dllm.config import DataConfig, ScheduleConfig, StageConfig
from megatron_dllm.data.costs import forward_tokens, segment_costs
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.spans import MASKABLE, MASKED, Spans
from tests.unit.data.random_spans import random_spans


def geometry(**changes: object) -> RowGeometry:
    settings = {
        "objective": "block_diffusion",
        "block_size": 4,
        "context_length": 16,
        "row_length": 64,
        "num_views": 1,
    } | changes
    return RowGeometry(**settings)


@pytest.mark.parametrize(
    ("changes", "lengths", "expected_costs"),
    [
        ({"objective": "ar", "num_views": 0}, [1, 5, 16], [1, 5, 16]),
        # 5 tokens in blocks of 4: 5 noisy and the 4 of the first block.
        ({}, [1, 4, 5, 8, 16], [1, 4, 9, 12, 28]),
        ({"prune_clean": False}, [1, 4, 5, 8, 16], [1, 4, 10, 16, 32]),
        ({"num_views": 2}, [1, 4, 5, 16], [2, 8, 14, 44]),
        ({"block_size": 16}, [1, 9, 16], [1, 9, 16]),  # MDLM: no clean copy
        ({"block_size": 16, "num_views": 2}, [1, 16], [2, 32]),
        ({"block_size": 1}, [1, 2, 16], [1, 3, 31]),
        ({"block_origin": "row"}, [1, 2, 4, 5, 16], [1, 3, 7, 9, 31]),  # bounds: the last block may be one token
        ({"block_origin": "row", "prune_clean": False}, [1, 2, 16], [1, 4, 32]),
    ],
)
def test_costs_by_hand(changes: dict[str, object], lengths: list[int], expected_costs: list[int]) -> None:
    assert segment_costs(geometry(**changes), np.array(lengths)).tolist() == expected_costs


def test_row_grid_by_hand_and_within_its_bound() -> None:
    grid = geometry(block_origin="row")
    # 6 tokens starting at 3 of the row's blocks of 4: sizes 1, 4, 1, so 5 are read by a later block.
    assert forward_tokens(grid, np.array([6]), np.array([3])).tolist() == [6 + 5]
    # 3 tokens inside one block.
    assert forward_tokens(grid, np.array([3]), np.array([5])).tolist() == [3]
    lengths, starts = np.meshgrid(np.arange(1, 17), np.arange(0, 12))
    bound = segment_costs(grid, lengths)
    cost = forward_tokens(grid, lengths, starts)
    assert (cost <= bound).all() and (cost.max(axis=0) == bound.max(axis=0)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "mlm"}, r"objective \(mlm\) is not known"),
        ({"block_origin": "page"}, r"block_origin \(page\) is not known"),
        ({"block_size": 0}, r"block_size \(0\) must be positive"),
        ({"num_views": 0}, r"num_views \(0\) must be"),
        ({"objective": "ar", "num_views": 1}, r"num_views \(1\) must be"),
    ],
)
def test_geometries_that_no_configuration_gives_are_asserted(changes: dict[str, object], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        geometry(**changes)


def test_rows_too_short_for_the_longest_segment_are_refused() -> None:
    with pytest.raises(ValueError, match=r"row_length \(27\) must hold the longest segment.*takes 28 tokens"):
        geometry(row_length=27)


def test_of_a_configured_stage() -> None:
    stage = StageConfig(
        block_size=8, num_tokens=1, global_batch_size=1, learning_rate=1.0, num_views=2, view_relation="complementary"
    )
    schedule = ScheduleConfig(context_length=16, row_length=48)
    expected_geometry = RowGeometry("block_diffusion", 8, 16, 48, 2, "row", False)
    assert RowGeometry.of_stage(stage, schedule, DataConfig(block_origin="row", prune_clean=False)) == expected_geometry


# --- spans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_views", "expected_pruned", "expected_full"), [(1, 1408, 2400), (2, 1632, 3616)])
def test_an_answer_behind_a_prompt_costs_its_blocks_and_the_clean_ones_before(
    num_views: int, expected_pruned: int, expected_full: int
) -> None:
    """A prompt of 1000 tokens and an answer of 200, filled up to the block's end."""
    length, answer = np.array([1216]), Spans.of_lists([[(1000, 1216, MASKABLE)]])
    pruned = geometry(block_size=32, context_length=2048, row_length=6144, num_views=num_views)
    assert segment_costs(pruned, length, answer).tolist() == [expected_pruned]
    assert segment_costs(replace(pruned, prune_clean=False), length, answer).tolist() == [num_views * 1216 + 1216]
    assert segment_costs(pruned, length).tolist() == [expected_full]


@pytest.mark.parametrize(
    ("spans", "expected_cost"),
    [
        ([], 0),
        ([(0, 1)], 4),  # block 0 alone, which reads nothing
        ([(12, 13)], 1 + 12),  # the last block holds one token
        ([(5, 6)], 4 + 4),
        ([(5, 6), (7, 8)], 4 + 4),  # one block, counted once
        ([(3, 9)], 12 + 8),  # blocks 0..2
        ([(0, 1), (11, 12)], 4 + 4 + 8),
        ([(0, 13)], 13 + 12),  # everything: as without spans
    ],
)
def test_costs_of_spans_by_hand(spans: list[tuple[int, int]], expected_cost: int) -> None:
    table = Spans.of_lists([[(start, stop, MASKABLE) for start, stop in spans]])
    assert segment_costs(geometry(), np.array([13]), table).tolist() == [expected_cost]


def test_hidden_tokens_alone_need_no_block() -> None:
    spans = Spans.of_lists([[(0, 4, MASKED), (5, 6, MASKABLE), (9, 12, MASKED)]])
    assert segment_costs(geometry(), np.array([13]), spans).tolist() == [4 + 4]


def test_an_ar_segment_is_its_tokens_whatever_its_spans() -> None:
    ar = geometry(objective="ar", num_views=0)
    assert segment_costs(ar, np.array([13]), Spans.of_lists([[(5, 6, MASKABLE)]])).tolist() == [13]


@pytest.mark.parametrize("seed", range(10))
def test_the_row_grid_never_costs_more_than_its_bound(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 17, 40)
    spans = random_spans(lengths.tolist(), seed)
    grid = geometry(block_origin="row", num_views=2, row_length=64)
    bound = segment_costs(grid, lengths, spans)
    for start in range(8):
        assert (forward_tokens(grid, lengths, np.full(40, start), spans) <= bound).all()

"""What a piece costs, in cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dllm.config import DataConfig, ScheduleConfig, StageConfig
from megatron_dllm.data.geometry import RowGeometry, clean_lengths, piece_costs


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
    assert piece_costs(geometry(**changes), np.array(lengths)).tolist() == expected_costs


def test_row_grid_by_hand_and_within_its_bound() -> None:
    grid = geometry(block_origin="row")
    # 6 tokens starting at 3 of the row's blocks of 4: sizes 1, 4, 1, so 5 are read by a later block.
    assert clean_lengths(grid, np.array([6]), np.array([3])).tolist() == [5]
    # 3 tokens inside one block.
    assert clean_lengths(grid, np.array([3]), np.array([5])).tolist() == [0]
    lengths, starts = np.meshgrid(np.arange(1, 17), np.arange(0, 12))
    bound = piece_costs(grid, lengths) - lengths
    kept = clean_lengths(grid, lengths, starts)
    assert (kept <= bound).all() and (kept.max(axis=0) == bound.max(axis=0)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "mlm"}, r"objective \(mlm\) is not known"),
        ({"block_origin": "page"}, r"block_origin \(page\) is not known"),
        ({"block_size": 0}, r"block_size \(0\) must be positive"),
        ({"num_views": 0}, r"num_views \(0\) must be"),
        ({"objective": "ar", "num_views": 1}, r"num_views \(1\) must be"),
        ({"row_length": 27}, r"row_length \(27\) must hold the longest piece.*takes 28 tokens"),
    ],
)
def test_impossible_geometries_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geometry(**changes)


def test_of_a_configured_stage() -> None:
    stage = StageConfig(
        block_size=8, num_tokens=1, global_batch_size=1, learning_rate=1.0, num_views=2, view_relation="complementary"
    )
    schedule = ScheduleConfig(context_length=16, row_length=48)
    expected_geometry = RowGeometry("block_diffusion", 8, 16, 48, 2, "row", False)
    assert RowGeometry.of_stage(stage, schedule, DataConfig(block_origin="row", prune_clean=False)) == expected_geometry

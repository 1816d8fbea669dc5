"""What a row holds: pairs counted on the mask, targets on the noise levels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dllm.config import ScheduleConfig
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.spans import FIXED, MASKABLE, Spans
from megatron_dllm.diffusion.roles import visible
from megatron_dllm.planning.engine_rows import micro_batches
from megatron_dllm.planning.rows import assumed_row, measured_row, visible_pairs
from tests.unit.config.configs import stage_config, train_config

GEOMETRY = RowGeometry("block_diffusion", 4, 32, 96, 1)


def _expected_pairs(geometry: RowGeometry, length: int) -> int:
    """Of one document, counted on the mask of its roles."""
    is_ar, size = geometry.objective == "ar", 1 if geometry.objective == "ar" else geometry.block_size
    clean = geometry.clean_block_size or size
    last = (length - 1) // size
    roles = [(0, p // size * (size // clean), view + 1) for view in range(geometry.num_views) for p in range(length)]
    keeps_last = is_ar or (not geometry.prune_clean and last > 0)
    has_target = [geometry.ar_share > 0 and place + 1 < length for place in range(length)]
    roles += [(0, p // clean, 0) for p in range(length) if p // size < last or keeps_last or has_target[p]]
    table = torch.tensor([roles], dtype=torch.int32)
    return int(visible(table, table).sum())


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 13, 32])
@pytest.mark.parametrize(
    "geometry",
    [
        GEOMETRY,
        replace(GEOMETRY, num_views=2),
        replace(GEOMETRY, block_size=1),
        replace(GEOMETRY, block_size=32),
        replace(GEOMETRY, prune_clean=False),
        replace(GEOMETRY, objective="ar", num_views=0),
        replace(GEOMETRY, clean_block_size=2),
        replace(GEOMETRY, clean_block_size=1, prune_clean=False),
        replace(GEOMETRY, clean_block_size=1, ar_share=1.0),
    ],
)
def test_pairs_are_those_of_the_mask(geometry: RowGeometry, length: int) -> None:
    assert visible_pairs(geometry, np.array([length]))[0] == _expected_pairs(geometry, length)


def test_a_row_holds_as_many_documents_as_fit() -> None:
    """16 noisy and 12 clean tokens a document: three of them in 96; half of their tokens are masked."""
    row = assumed_row(GEOMETRY, stage_config(t_min=0.0, t_max=1.0, at_least_one=False), 16)
    assert (row.length, row.document_tokens, row.targets) == (96, 48.0, 24.0)
    assert row.pairs == 3 * _expected_pairs(GEOMETRY, 16)


@pytest.mark.parametrize(("size", "views"), [(1, 1), (2, 2), (32, 1)])
def test_targets_are_those_of_the_program_s_own_rows(size: int, views: int) -> None:
    """Every block has a masked token, so with blocks of one token all of them are targets."""
    stage = stage_config(block_size=size, num_views=views, micro_batch_size=8, global_batch_size=8)
    run = train_config(schedule=ScheduleConfig(context_length=256, row_length=2048, stages={"one": stage}))
    (batch,) = micro_batches(run, stage, 1)
    planned = assumed_row(RowGeometry.of_stage(stage, run.schedule, run.data), stage, 256)
    assert planned.targets == pytest.approx(len(batch.target_ids) / 8, rel=0.03)
    assert size > 1 or planned.targets == pytest.approx(planned.document_tokens, rel=1e-3)


def test_ar_rows_hold_more_documents() -> None:
    """A quarter of the tokens in AR rows of 96 tokens, the rest in noisy rows of 48."""
    stage = stage_config(block_size=4, t_min=0.0, t_max=1.0, ar_weight=0.5, ar_row_share=0.25, at_least_one=False)
    row = assumed_row(GEOMETRY, stage, 16)
    assert row.document_tokens == pytest.approx(1 / (0.75 / 48 + 0.25 / 96))
    assert row.targets == pytest.approx(row.document_tokens * (0.75 * 0.5 + 0.25))
    ar = replace(GEOMETRY, objective="ar", num_views=0)
    pairs = 0.75 * _expected_pairs(GEOMETRY, 16) + 0.25 * _expected_pairs(ar, 16)
    assert row.pairs == pytest.approx(row.document_tokens / 16 * pairs)


def test_a_long_document_is_cut_at_the_context() -> None:
    assert assumed_row(GEOMETRY, stage_config(), 10_000) == replace(
        assumed_row(GEOMETRY, stage_config(), 32), source="assumed: documents of 32 tokens"
    )


def test_only_what_may_carry_a_loss_becomes_targets() -> None:
    """Of 10 and 6 tokens, 4 and 2 may be masked; a row of 32 document tokens has twice as many of each."""
    spans = Spans.of_lists([[(0, 6, FIXED), (6, 10, MASKABLE)], [(4, 6, MASKABLE)]])
    row = measured_row(GEOMETRY, stage_config(t_min=0.0, t_max=1.0, at_least_one=False), 32.0, np.array([10, 6]), spans)
    assert row.targets == pytest.approx(32 * (6 / 16) / 2)
    assert row.pairs == 2 * (_expected_pairs(GEOMETRY, 10) + _expected_pairs(GEOMETRY, 6))

"""Rows built from lengths alone, whose tokens can be told apart."""

from __future__ import annotations

import numpy as np

from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import RowPlan
from megatron_dllm.data.row import Row, RowContent, RowNoise, build_row, lay_out_row
from megatron_dllm.diffusion.noise import NoiseSpec

MASK, PAD = 99, 98


def spec(num_views: int = 1, **changes: object) -> NoiseSpec:
    settings = {
        "t_unit": "block",
        "is_stratified": True,
        "at_least_one": True,
        "loss_weight": "elbo",
        "t_min": 0.1,
        "t_max": 0.9,
        "num_views": num_views,
        "view_relation": "complementary" if num_views == 2 else "stratified",
    } | changes
    return NoiseSpec(**settings)


def make_plan(
    lengths: list[int], epoch: int = 0, sample_ids: list[int] | None = None, kinds: list[int] | None = None
) -> tuple[RowPlan, RowContent]:
    """Segments whose tokens are 1, 2, 3, ... of sample 0, then 1, 2, 3, ... + 10 of sample 100, and so on."""
    sample_ids = list(range(0, 100 * len(lengths), 100)) if sample_ids is None else sample_ids
    segments = np.array([[i, 0, n, i] for i, n in enumerate(lengths)], dtype=np.int64).reshape(-1, 4)
    segments[:, 3] = np.array(sample_ids) // 100
    clean_ids = np.concatenate(
        [np.zeros(0, np.int64), *[1 + np.arange(n) + s // 10 for s, n in zip(sample_ids, lengths, strict=True)]]
    )
    kinds_array = None if kinds is None else np.array(kinds, dtype=np.uint8)
    return RowPlan(segments, epoch), RowContent(clean_ids, np.array(sample_ids, dtype=np.int64), kinds_array)


def make_row(
    lengths: list[int],
    geometry: RowGeometry,
    noise: NoiseSpec | None,
    *,
    epoch: int = 0,
    sample_ids: list[int] | None = None,
    kinds: list[int] | None = None,
) -> Row:
    """A row of the segments of `make_plan`, its noise drawn with seed 0."""
    plan, content = make_plan(lengths, epoch, sample_ids, kinds)
    return build_row(plan, content, geometry, noise, seed=0, mask_token_id=MASK, pad_token_id=PAD)


def make_masked_row(
    lengths: list[int], geometry: RowGeometry, masks: list[list[int]], *, epoch: int = 0, kinds: list[int] | None = None
) -> Row:
    """A row masked by hand, one list of its document tokens for each view: weights 10 + view, t = 0.1 x position."""
    plan, content = make_plan(lengths, epoch, None, kinds)
    masked = np.array([[0] * len(content.clean_ids), *masks], dtype=bool)
    weights = np.where(masked, 10.0 + np.arange(len(masked))[:, None], 0.0).astype(np.float32)
    positions = np.concatenate([1 + np.arange(n) for n in lengths])
    t = np.tile(0.1 * positions, (len(masked), 1)).astype(np.float32)
    noise = RowNoise(masked, weights, t)
    return lay_out_row(plan, content, geometry, noise, mask_token_id=MASK, pad_token_id=PAD)

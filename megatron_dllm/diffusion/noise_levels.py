"""The noise level t of every block of a segment, in one view or in several that share its range."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.diffusion.draws import Draws, Purpose
from megatron_dllm.diffusion.level_density import drawn_levels
from megatron_dllm.diffusion.noise_spec import SPREAD, NoiseSpec
from megatron_dllm.diffusion.segment_blocks import SegmentBlocks, SegmentKey

FloatArray = NDArray[np.float64]

_BELOW_ONE = float(np.nextafter(1.0, 0.0))
# A level is rounded to so many bits where it decides counts in integers: exact up to blocks of 2^20 in 2^10 views.
_LEVEL_BITS = 32


def view_levels(spec: NoiseSpec, views: Sequence[Draws], key: SegmentKey, blocks: SegmentBlocks) -> list[FloatArray]:
    """[c] noise levels of each of the views that are drawn.

    Args:
        spec: how to draw them.
        views: random numbers of each view.
        key: of the segment.
        blocks: of the segment.
    """
    if spec.view_relation in ("stratified", SPREAD) and spec.num_views > 1:
        return _stratified_levels(spec, views[0], key, blocks)
    return [_levels(spec, _unit_levels(spec, view, key, len(blocks.size)), blocks) for view in views]


def _unit_levels(spec: NoiseSpec, draws: Draws, key: SegmentKey, num_blocks: int) -> FloatArray:
    """[c] float64, each uniform on [0, 1): where every block's t lies in its range."""
    if spec.t_unit == "row":
        return np.repeat(draws.uniform(Purpose.LEVEL, key.row_key, 1), num_blocks)
    if not spec.is_stratified:
        count = num_blocks if spec.t_unit == "block" else 1
        return np.broadcast_to(draws.uniform(Purpose.LEVEL, key.level_id, count), num_blocks)
    # If a second independent view were spread over ordinals as well, it would keep a constant distance to the first.
    base = float(draws.uniform(Purpose.LEVEL, key.level_id, 1)[0]) if draws.view else draws.even_level(key.ordinal)
    if spec.t_unit == "document":
        return np.full(num_blocks, base)
    # Stable: the order of equal keys must not depend on the machine.
    stratum = np.argsort(draws.raw(Purpose.STRATUM, key.level_id, num_blocks), kind="stable")
    return np.minimum((stratum + base) / num_blocks, _BELOW_ONE)


def _levels(spec: NoiseSpec, u: FloatArray, blocks: SegmentBlocks) -> FloatArray:
    """Noise levels of the blocks of a view.

    Args:
        spec: how to draw them.
        u: [c] float64 in [0, 1), where each level lies in its range.
        blocks: of the segment.

    Returns:
        [c] float64: t, or with is_count the share of a block's tokens that will be masked.
    """
    if not spec.is_count:
        return drawn_levels(spec, u)
    if spec.is_complementary:  # 0..B: the complement of B tokens is none, and has its share in the ELBO
        return np.minimum((u * (blocks.size + 1)).astype(np.int64), blocks.size) / blocks.size
    return np.minimum(1 + (u * blocks.size).astype(np.int64), blocks.size) / blocks.size


def _stratified_levels(spec: NoiseSpec, draws: Draws, key: SegmentKey, blocks: SegmentBlocks) -> list[FloatArray]:
    """[c] noise levels of each of K views: u_k = (pi(k) + u) / K, with u and the permutation pi drawn by unit of t.

    Each u_k is uniform on [0, 1), and the K of them lie one in each K-th part. Counts are computed in integers, so
    that K views of a block of K tokens mask 1, 2, ... K of them, whatever is rounded.
    """
    num_views, num_blocks = spec.num_views, len(blocks.size)
    u = _unit_levels(spec, draws, key, num_blocks)
    num_units = num_blocks if spec.t_unit == "block" else 1
    identity = key.row_key if spec.t_unit == "row" else key.level_id
    raw = draws.raw(Purpose.VIEW_ORDER, identity, num_units * num_views).reshape(num_units, num_views)
    orders = np.broadcast_to(np.argsort(raw, axis=1, kind="stable"), (num_blocks, num_views)).T
    if not spec.is_count:
        return [_levels(spec, np.minimum((order + u) / num_views, _BELOW_ONE), blocks) for order in orders]
    bits = (u * 2**_LEVEL_BITS).astype(np.int64)
    counts = [1 + ((order << _LEVEL_BITS) + bits) * blocks.size // (num_views << _LEVEL_BITS) for order in orders]
    return [count / blocks.size for count in counts]

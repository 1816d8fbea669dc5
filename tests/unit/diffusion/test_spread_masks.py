"""Views of one count take turns, each view by itself is as random as ever, and the mean over them errs less."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from megatron_dllm.diffusion.noise_masks import count_mask
from megatron_dllm.diffusion.segment_blocks import SegmentBlocks
from megatron_dllm.diffusion.spread_masks import spread_masks


def blocks_of(*sizes: int) -> SegmentBlocks:
    return SegmentBlocks.group(np.repeat(np.arange(len(sizes)), sizes))


def shown(masks: np.ndarray) -> list[str]:
    return ["".join("x" if flag else "." for flag in mask) for mask in masks.tolist()]


def test_turns_by_hand() -> None:
    order = np.tile([0.1, 0.2, 0.3, 0.4], (5, 1))
    for count, expected in (
        (1, ["x...", ".x..", "..x.", "...x", "x..."]),
        (2, ["xx..", "..xx", ".xx.", "x..x", "xx.."]),
        (3, ["xxx.", "xx.x", "x.xx", ".xxx", "xxx."]),
        (4, ["xxxx"] * 5),
    ):
        assert shown(spread_masks(np.full((5, 1), count), order, blocks_of(4))) == expected


def test_a_new_round_has_an_order_of_its_own() -> None:
    orders = np.array([[0.1, 0.2], [0.1, 0.2], [0.2, 0.1], [0.1, 0.2]])
    assert shown(spread_masks(np.ones((4, 1), np.int64), orders, blocks_of(2))) == ["x.", ".x", ".x", "x."]


def test_views_of_different_counts_are_independent() -> None:
    draw, blocks = np.random.default_rng(1), blocks_of(3, 5)
    uniforms = draw.random((3, 8))
    counts = np.array([[1, 4], [3, 2], [2, 5]])
    expected = [count_mask(count, of_view, blocks) for count, of_view in zip(counts, uniforms, strict=True)]
    assert np.array_equal(spread_masks(counts, uniforms, blocks), np.stack(expected))


@pytest.mark.parametrize(("size", "num_views"), [(4, 12), (5, 7), (3, 8)])
def test_views_of_one_count_differ_and_mask_every_token_as_often(size: int, num_views: int) -> None:
    draw, blocks = np.random.default_rng(size), blocks_of(size, 2)
    for count in range(1, size):
        counts = np.stack([np.full(num_views, count), np.ones(num_views)], axis=1).astype(np.int64)
        masks = spread_masks(counts, draw.random((num_views, size + 2)), blocks)
        assert (masks[:, :size].sum(axis=1) == count).all() and (masks[:, size:].sum(axis=1) == 1).all()
        for start in range(0, num_views - size + 1, size):
            a_round = masks[start : start + size, :size]
            assert len(set(shown(a_round))) == size and (a_round.sum(axis=0) == count).all()


def test_a_view_by_itself_masks_every_subset_equally_often() -> None:
    num_draws, draw = 6000, np.random.default_rng(3)
    found = [Counter[str]() for _ in range(3)]
    for _ in range(num_draws):
        for view, mask in enumerate(shown(spread_masks(np.full((3, 1), 2), draw.random((3, 4)), blocks_of(4)))):
            found[view][mask] += 1
    for counter in found:
        assert len(counter) == 6 and all(abs(number - num_draws / 6) < 150 for number in counter.values())


def test_the_mean_errs_less_than_with_independent_masks() -> None:
    """A made-up NLL of masked tokens given the others, all masks counted for its exact ELBO."""
    size, num_views, draw = 4, 12, np.random.default_rng(7)
    nll = {flags: draw.gamma(1.0, 3.0, size) * np.array(flags) for flags in product((0, 1), repeat=size)}
    subsets = [(m, places) for m in range(1, size + 1) for places in combinations(range(size), m)]
    exact = 0.0
    for count, places in subsets:
        flags = tuple(int(i in places) for i in range(size))
        exact += nll[flags].sum() / (count * comb(size, count))
    counts = np.tile(np.arange(1, size + 1), num_views // size)[:, None]
    weights = size / counts[:, 0]

    def estimate(masks: np.ndarray) -> float:
        values = [nll[tuple(mask.astype(int).tolist())].sum() for mask in masks]
        return float((weights * values).mean())

    uniforms, blocks = draw.random((400, num_views, size)), blocks_of(size)
    spread = np.array([estimate(spread_masks(counts, u, blocks)) for u in uniforms])
    apart = np.array(
        [estimate(np.stack([count_mask(c, v, blocks) for c, v in zip(counts, u, strict=True)])) for u in uniforms]
    )
    assert abs(spread.mean() - exact) < 4 * spread.std() / 20 and abs(apart.mean() - exact) < 4 * apart.std() / 20
    assert spread.std() < 0.75 * apart.std()

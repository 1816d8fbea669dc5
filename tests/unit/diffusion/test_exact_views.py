"""Views without chance: every mask once, or one token after the other."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dllm.diffusion.exact_views import ENUMERATED, LEFT_TO_RIGHT, exact_views
from megatron_dllm.diffusion.noise import sample_noise
from megatron_dllm.diffusion.noise_spec import NoiseSpec


def test_two_blocks_by_hand() -> None:
    masks, weights, levels = exact_views(ENUMERATED, np.array([2, 1]), 3)
    assert masks.astype(int).tolist() == [[1, 0, 1], [0, 1, 0], [1, 1, 0]]
    # One of two tokens weighs 1 / (1 * 2), both 1 / (2 * 1), a lone one 1; times 3 views, whose mean is taken.
    assert (weights * masks).tolist() == [[1.5, 0, 3], [0, 1.5, 0], [1.5, 1.5, 0]]
    assert levels.tolist() == [[0.5, 1], [0.5, 0], [1, 0]]
    masks, weights, _ = exact_views(LEFT_TO_RIGHT, np.array([1, 2]), 2)
    assert masks.astype(int).tolist() == [[1, 1, 1], [0, 0, 1]]
    assert (weights * masks).tolist() == [[2, 2, 0], [0, 0, 2]]


@pytest.mark.parametrize("relation", [ENUMERATED, LEFT_TO_RIGHT])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_constant_nll_gives_one_for_each_token(relation: str, size: int) -> None:
    num_views = 2**size - 1
    masks, weights, _ = exact_views(relation, np.array([size]), num_views)
    assert (masks * weights).sum() / num_views == pytest.approx(size)
    if relation == ENUMERATED:
        assert len({tuple(mask) for mask in masks.tolist()}) == num_views and masks.any(axis=1).all()


def test_the_noise_of_a_segment_leaves_fixed_tokens_alone() -> None:
    spec = NoiseSpec("block", False, True, "elbo", 0.0, 1.0, 3, view_relation=ENUMERATED)
    loss_mask = np.array([False, True, True, True, False])
    ids = dict(seed=0, epoch=0, sample_id=1, ordinal=2, row_key=3)
    noise = sample_noise(spec, **ids, block_ids=np.array([0, 0, 0, 1, 1]), loss_mask=loss_mask)
    assert noise.is_masked.astype(int).tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert noise.loss_weights.tolist() == [[0, 1.5, 0, 3, 0], [0, 0, 1.5, 0, 0], [0, 1.5, 1.5, 0, 0]]
    assert noise.t[:, 3].tolist() == [1, 0, 0] and not noise.t[:, 0].any()


def test_too_few_views_are_asserted() -> None:
    with pytest.raises(AssertionError, match="a block of 3 tokens takes 7 enumerated views, not 6"):
        exact_views(ENUMERATED, np.array([2, 3]), 6)

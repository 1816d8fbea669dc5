"""Which tokens are masked: as often as the level says, at least one of a block, and none that may not carry a loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.diffusion.test_noise import COUNT, PAIR, SINGLE, blocks_of, draw


@pytest.mark.parametrize("spec", [replace(SINGLE, at_least_one=False), PAIR], ids=["single", "pair"])
@pytest.mark.parametrize("unit", ["block", "document"])
def test_tokens_are_masked_with_probability_t(spec, unit):
    deviations = []
    for sample_id in range(200):
        noise = draw(replace(spec, t_unit=unit), blocks_of(8, 32), sample_id=sample_id, ordinal=sample_id)
        deviations.append((noise.is_masked - noise.t.astype(np.float64)).mean(axis=1))
        assert np.isclose(noise.t.sum(axis=0), 1.0).all() or spec.num_views == 1
    error = np.std(deviations, axis=0) / len(deviations) ** 0.5
    assert (error < 0.01).all() and (np.abs(np.mean(deviations, axis=0)) < 5 * error).all()


def test_complementary_masks_partition_the_loss_mask():
    loss_mask = np.random.default_rng(1).random(256) < 0.6
    for sample_id in range(20):
        noise = draw(PAIR, blocks_of(32, 8), loss_mask, sample_id=sample_id)
        np.testing.assert_array_equal(noise.is_masked.sum(axis=0), loss_mask)
        np.testing.assert_allclose(noise.t.sum(axis=0)[loss_mask], 1.0, atol=1e-6)


@pytest.mark.parametrize("spec", [SINGLE, replace(SINGLE, t_unit="document"), COUNT])
def test_every_block_has_a_masked_token(spec):
    loss_mask = np.random.default_rng(2).random(400) < 0.5
    block_ids = blocks_of(4, 100)
    has_maskable = np.bincount(block_ids, loss_mask) > 0
    for sample_id in range(50):
        noise = draw(spec, block_ids, loss_mask, sample_id=sample_id, ordinal=sample_id)
        np.testing.assert_array_equal(np.bincount(block_ids, noise.is_masked[0]) > 0, has_maskable)


@pytest.mark.parametrize("spec", [SINGLE, PAIR, COUNT, replace(SINGLE, loss_weight="realised")])
def test_tokens_outside_the_loss_mask_are_left_alone(spec):
    loss_mask = np.random.default_rng(3).random(128) < 0.5
    noise = draw(spec, blocks_of(8, 16), loss_mask)
    assert not noise.is_masked[:, ~loss_mask].any()
    assert not noise.t[:, ~loss_mask].any()
    np.testing.assert_array_equal(noise.loss_weights > 0, noise.is_masked)


def test_weight_counts_only_the_maskable_tokens_of_a_partial_block():
    # Row grid: the segment starts inside block 7 and ends inside block 9; one token of block 8 is a prompt.
    block_ids, loss_mask = [7, 7, 8, 8, 8, 8, 9], [1, 1, 0, 1, 1, 1, 1]
    noise = draw(SINGLE, block_ids, loss_mask)
    for block, size in ((7, 2), (8, 3), (9, 1)):
        tokens = (np.array(block_ids) == block) & noise.is_masked[0]
        t = noise.t[0, tokens].astype(np.float64)
        np.testing.assert_allclose(noise.loss_weights[0, tokens], (1 - (1 - t) ** size) / t, rtol=1e-5)
    assert noise.loss_weights[0, 6] == 1.0


def test_only_the_grouping_of_block_ids_matters():
    shifted = draw(SINGLE, blocks_of(4, 8) + 1000)
    np.testing.assert_array_equal(draw(SINGLE, blocks_of(4, 8)).loss_weights, shifted.loss_weights)


def test_count_noise_draws_every_count_and_subset_alike():
    size, count = 3, 60_000
    masks = draw(COUNT, blocks_of(size, count)).is_masked[0].reshape(-1, size)
    num = masks.sum(axis=1)
    # Stratified: the numbers 1..3 come equally often, to within one block.
    assert np.abs(np.bincount(num, minlength=4)[1:] - count // size).max() <= 1
    np.testing.assert_allclose(masks[num == 1].mean(axis=0), 1 / 3, atol=0.02)
    np.testing.assert_allclose(masks[num == 2].mean(axis=0), 2 / 3, atol=0.02)

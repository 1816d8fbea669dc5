"""The levels of blocks, documents and rows: one in every stratum, uniform over their range, shared by their unit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.diffusion.test_noise import SINGLE, blocks_of, draw


@pytest.mark.parametrize("num_blocks", [1, 5, 128])
def test_one_t_in_every_stratum(num_blocks):
    spec = replace(SINGLE, t_min=0.2, t_max=0.7)
    loss_mask = np.arange(4 * num_blocks) % 4 != 0
    for sample_id in range(10):
        noise = draw(spec, blocks_of(4, num_blocks), loss_mask, sample_id=sample_id, ordinal=sample_id)
        per_block = noise.t[0].reshape(num_blocks, 4)[:, 1:].astype(np.float64)
        assert (per_block == per_block[:, :1]).all()
        strata = np.floor((per_block[:, 0] - 0.2) / 0.5 * num_blocks + 1e-4).astype(int)
        # A float32 on a boundary may fall on either side; offsets are shared, so gaps are equal.
        np.testing.assert_allclose(np.diff(np.sort(per_block[:, 0])), 0.5 / num_blocks, atol=1e-6)
        assert sorted(strata) == list(range(num_blocks))


def test_strata_without_maskable_tokens_are_not_wasted():
    loss_mask = np.repeat([False, True, False, True], 4)
    noise = draw(SINGLE, blocks_of(4, 4), loss_mask)
    low, high = sorted(noise.t[0, [4, 12]])
    assert low < 0.5 <= high


def test_strata_are_dealt_at_random():
    first_block = [draw(SINGLE, blocks_of(4, 4), sample_id=i).t[0, 0] for i in range(400)]
    counts = np.bincount((np.array(first_block) * 4).astype(int), minlength=4)
    assert (np.abs(counts - 100) < 50).all()


@pytest.mark.parametrize("start", [0, 12_345, 10**12])
def test_consecutive_ordinals_spread_evenly(start):
    spec = replace(SINGLE, t_unit="document")
    levels = [draw(spec, [0, 0], sample_id=9, ordinal=start + i).t[0, 0] for i in range(64)]
    levels = np.sort(np.array(levels, dtype=np.float64))
    gaps = np.diff(levels, append=levels[0] + 1)
    # 64 independent draws leave a gap of about 0.07; the golden ratio leaves none above 0.026.
    assert gaps.max() < 0.03 and gaps.min() > 0.005


def test_t_is_shared_by_its_unit():
    ids = blocks_of(4, 16)
    document = replace(SINGLE, t_unit="document")
    row = replace(SINGLE, t_unit="row")
    assert len(np.unique(draw(document, ids).t)) == 1
    assert len(np.unique(draw(replace(document, is_stratified=False), ids).t)) == 1
    assert len(np.unique(draw(SINGLE, ids).t)) == 16
    assert draw(row, ids, sample_id=1, ordinal=1).t[0, 0] == draw(row, ids, sample_id=2, ordinal=2).t[0, 0]
    assert draw(row, ids, row_key=1).t[0, 0] != draw(row, ids, row_key=2).t[0, 0]
    assert draw(document, ids, row_key=1).t[0, 0] == draw(document, ids, row_key=2).t[0, 0]


@pytest.mark.parametrize("is_stratified", [True, False])
@pytest.mark.parametrize("unit", ["block", "document", "row"])
def test_t_is_uniform_over_its_range(unit, is_stratified):
    spec = replace(SINGLE, t_unit=unit, is_stratified=is_stratified, t_min=0.25, t_max=0.75)
    levels = np.array([draw(spec, blocks_of(1, 4), sample_id=i, ordinal=i, row_key=i).t[0, 0] for i in range(2000)])
    assert levels.min() >= 0.25 and levels.max() <= 0.75
    np.testing.assert_allclose(np.histogram(levels, 5, (0.25, 0.75))[0] / 2000, 0.2, atol=0.05)

"""Masks drawn again until their share lies in the band: the counts, their distribution, and what no block can do."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import numpy as np
import pytest

from megatron_dllm.config import NoiseConfig
from megatron_dllm.config.levels import band_of_counts
from megatron_dllm.diffusion.band_masks import counts_in_band
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from tests.unit.config.configs import stage_config
from tests.unit.diffusion.test_noise import SINGLE, draw

BAND = replace(SINGLE, t_min=0.3, t_max=0.8, resample_masks=True, t_unit="block")


@pytest.mark.parametrize(("size", "t_min", "t_max", "expected"), [(4, 0.3, 0.8, (2, 3)), (10, 0.3, 0.8, (3, 8))])
def test_the_counts_of_a_band_by_hand(size: int, t_min: float, t_max: float, expected: tuple[int, int]) -> None:
    assert band_of_counts(size, t_min, t_max) == expected
    least, most = band_of_counts(4, 0.3, 0.45)
    assert least > most  # a quarter and a half lie outside
    assert band_of_counts(4, 0.0, 1.0) == (1, 4)


@pytest.mark.parametrize(("size", "t"), [(4, 0.5), (4, 0.3), (16, 0.7), (1, 0.4)])
def test_counts_are_binomial_given_the_band(size: int, t: float) -> None:
    number = 40_000
    u = (np.arange(number) + 0.5) / number
    found = counts_in_band(np.full(number, t), u, np.full(number, size), 0.3, 0.8)
    least, most = band_of_counts(size, 0.3, 0.8)
    if least > most:
        assert set(found) == {1}
        return
    weights = {m: comb(size, m) * t**m * (1 - t) ** (size - m) for m in range(least, most + 1)}
    for m, weight in weights.items():
        assert (found == m).mean() == pytest.approx(weight / sum(weights.values()), abs=1e-4)
    assert set(found) <= set(weights)


def test_the_ends_of_the_levels_are_no_trouble() -> None:
    found = counts_in_band(np.array([0.0, 1.0, 0.0, 1.0]), np.full(4, 0.9), np.array([4, 4, 9, 1]), 0.0, 1.0)
    assert found.tolist() == [1, 4, 1, 1]


@pytest.mark.parametrize("t_unit", ["block", "document"])
def test_every_mask_lies_in_the_band_and_any_subset_is_as_likely(t_unit: str) -> None:
    size, spec = 8, replace(BAND, t_unit=t_unit)
    noise = [draw(spec, np.repeat(np.arange(40), size), sample_id=number, ordinal=number) for number in range(200)]
    masked = np.stack([one.is_masked[0].reshape(40, size) for one in noise]).reshape(-1, size)
    counts = masked.sum(axis=1)
    assert counts.min() == 3 and counts.max() == 6 and len(set(counts.tolist())) == 4
    np.testing.assert_allclose(masked.mean(axis=0), masked.mean(), atol=0.02)
    # 1/t of the level that was drawn, as BD3-LM weighs; without the correction for masks of one token or more.
    for one in noise[:5]:
        shown = one.is_masked
        np.testing.assert_allclose(one.loss_weights[shown], 1.0 / one.t[shown], rtol=1e-6)


def test_a_stage_asks_for_it_and_records_name_it_then() -> None:
    asked, plain = (
        NoiseSpec.for_stage(NoiseConfig(), stage_config(t_min=0.3, t_max=0.8, resample_masks=flag))
        for flag in (True, False)
    )
    assert asked.stated()["resample_masks"] is True and "resample_masks" not in plain.stated()

"""Bands of noise levels against the closed form of a model that is equally wrong everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dllm.diffusion.noise import sample_noise
from megatron_dllm.evaluation.band import WHOLE, candidates, measure_bands
from megatron_dllm.evaluation.block_losses import LEVELS


def expected_relative_variance(size: int, low: float, high: float) -> float:
    """Of the loss c P/t m of a block: m of n tokens masked with probability t each, at least one, P that one is.

    Given t, m has the moments of a binomial over P: the loss has the mean c n and the mean square
    c^2 P (n t (1 - t) + n^2 t^2) / t^2.
    """
    t = low + (high - low) * (np.arange(100_000) + 0.5) / 100_000
    one = 1 - (1 - t) ** size
    return float((one * (1 + (1 - t) / (size * t))).mean() - 1)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_equal_losses_vary_as_the_number_of_masked_tokens_does(size: int) -> None:
    count = 60_000
    noise = sample_noise(
        LEVELS,
        seed=3,
        epoch=0,
        sample_id=1,
        ordinal=0,
        row_key=0,
        block_ids=np.repeat(np.arange(count), size),
        loss_mask=np.ones(count * size, bool),
    )
    losses = 2.5 * noise.loss_weights[0].reshape(count, size).sum(axis=1, dtype=np.float64)
    for band in measure_bands(noise.t[0, ::size].astype(np.float64), losses, candidates()):
        expected = expected_relative_variance(size, band.t_min, band.t_max)
        assert band.relative_variance == pytest.approx(expected, rel=0.1, abs=1e-6), band
        assert band.mean == pytest.approx(2.5 * size, rel=0.05)
        assert band.num_blocks == pytest.approx(count * (band.t_max - band.t_min), rel=0.02)


def test_the_candidates_are_those_of_five_widths() -> None:
    bands = candidates()
    assert WHOLE in bands and len(bands) == 1 + 11 + 9 + 7 + 5 + 3 == len(set(bands))
    assert all(0.0 < low < high <= 1.0 for low, high in bands)
    assert (0.3, 0.8) in bands and (0.001, 0.5) in bands and (0.5, 1.0) in bands


def test_the_band_that_varies_least_comes_first() -> None:
    levels = np.linspace(0.01, 1.0, 100)
    losses = np.where(levels < 0.5, 1.0 + 0.5 * (np.arange(100) % 2), 2.0)
    first, *_, last = measure_bands(levels, losses, [(0.001, 0.4), (0.5, 1.0), WHOLE])
    assert (first.t_min, first.t_max, first.relative_variance) == (0.5, 1.0, 0.0)
    assert last.relative_variance > 0.02


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluation.num_tokens gives 2 blocks, of which 1 lie in \[0.2, 0.7\]"):
        measure_bands(np.array([0.3, 0.9]), np.ones(2), [(0.2, 0.7)])

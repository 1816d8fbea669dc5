"""The expected share of masked tokens is that of masks that were drawn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_dllm.diffusion.mask_share import mask_share
from megatron_dllm.diffusion.noise import sample_noise
from megatron_dllm.diffusion.noise_spec import NoiseSpec

SINGLE = NoiseSpec(
    t_unit="block", is_stratified=True, at_least_one=True, loss_weight="elbo", t_min=0.001, t_max=1.0, num_views=1
)
SPECS = {
    "at least one": SINGLE,
    "none allowed": replace(SINGLE, at_least_one=False),
    "a band": replace(SINGLE, t_min=0.3, t_max=0.8),
    "two views": replace(SINGLE, num_views=2),
    "complementary": replace(SINGLE, num_views=2, view_relation="complementary", t_min=0.1, t_max=0.5),
    "a bell": replace(SINGLE, t_density="bell", t_bell_center=0.3),
    "later tokens longer": replace(SINGLE, order_bias=1.0),
    "drawn again": replace(SINGLE, resample_masks=True, t_min=0.3, t_max=0.8),
    "counts": replace(SINGLE, is_count=True, t_min=0.0),
}


def _drawn(spec: NoiseSpec, size: int) -> float:
    """Of the program's own masks of 20,000 blocks."""
    block_ids = np.repeat(np.arange(20_000), size)
    place = dict(seed=7, epoch=0, sample_id=11, ordinal=3, row_key=5)
    loss_mask = np.ones(len(block_ids), dtype=np.bool_)
    return float(sample_noise(spec, block_ids=block_ids, loss_mask=loss_mask, **place).is_masked.mean())


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name", SPECS)
def test_the_share_is_that_of_drawn_masks(name: str, size: int) -> None:
    assert mask_share(SPECS[name], size) == pytest.approx(_drawn(SPECS[name], size), rel=0.01)


def test_small_blocks_by_hand() -> None:
    """The integral of t / (1 - (1 - t)^n) over [0, 1]: 1 for one token, ln 2 for two."""
    whole = replace(SINGLE, t_min=0.0)
    assert mask_share(whole, 1) == pytest.approx(1.0)
    assert mask_share(whole, 2) == pytest.approx(math.log(2.0), rel=1e-5)


def test_a_rising_level_counts_as_a_mean_over_the_stage() -> None:
    """From 0.5 to 1 over the first half: a mean level of 0.75 / 2 there, of 1 / 2 behind it."""
    rising = replace(SINGLE, at_least_one=False, t_min=0.0, t_max_start=0.5, t_max_ramp_share=0.5)
    assert mask_share(rising, 4) == pytest.approx((0.375 + 0.5) / 2)

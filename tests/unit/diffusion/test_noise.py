"""The noise is pure, and its weighted loss is the ELBO: checked against the sum over every mask, integrated over t."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction
from math import comb

import numpy as np
import pytest

from megatron_dllm.config import NoiseConfig, StageConfig
from megatron_dllm.diffusion.noise import SegmentNoise, sample_noise
from megatron_dllm.diffusion.noise_masks import first_masked
from megatron_dllm.diffusion.noise_spec import NoiseSpec

SINGLE = NoiseSpec(
    t_unit="block", is_stratified=True, at_least_one=True, loss_weight="elbo", t_min=0.0, t_max=1.0, num_views=1
)
PAIR = replace(SINGLE, num_views=2, view_relation="complementary")
COUNT = NoiseSpec.for_validation()


def draw(spec: NoiseSpec, block_ids, loss_mask=None, **key) -> SegmentNoise:
    block_ids = np.asarray(block_ids, dtype=np.int64)
    loss_mask = np.ones(len(block_ids), bool) if loss_mask is None else np.asarray(loss_mask, dtype=bool)
    key = {"seed": 7, "epoch": 0, "sample_id": 11, "ordinal": 3, "row_key": 5} | key
    return sample_noise(spec, block_ids=block_ids, loss_mask=loss_mask, **key)


def blocks_of(size: int, count: int) -> np.ndarray:
    return np.repeat(np.arange(count), size)


def nll_table(size: int) -> np.ndarray:
    """[2^size, size] an NLL for every token under every mask of a block, bit i of the row being token i."""
    return np.random.default_rng(size).uniform(0.5, 4.0, (2**size, size))


def all_masks(size: int) -> np.ndarray:
    """[2^size, size] bool, every mask of a block."""
    return np.arange(2**size)[:, None] >> np.arange(size) & 1 == 1


def expected_block_elbo(table: np.ndarray, t_min: float, t_max: float) -> float:
    """Mean over t in [t_min, t_max] of (1/t) sum over masks P(mask | t) sum of masked NLLs: exact, in fractions."""
    size, low, high = table.shape[1], Fraction(t_min), Fraction(t_max)
    total = 0.0
    for mask, nll in zip(all_masks(size), table, strict=True):
        num = int(mask.sum())
        if num == 0:
            continue
        # t^(num-1) (1-t)^(size-num), expanded and integrated term by term.
        integral = sum(
            comb(size - num, j) * (-1) ** j * (high ** (num + j) - low ** (num + j)) / (num + j)
            for j in range(size - num + 1)
        )
        total += float(integral / (high - low)) * nll[mask].sum()
    return total


def block_losses(noise: SegmentNoise, size: int, table: np.ndarray) -> np.ndarray:
    """[blocks] sum over views of the weighted NLL of every block."""
    total = np.zeros(noise.is_masked.shape[1] // size)
    for masked, weights in zip(noise.is_masked, noise.loss_weights, strict=True):
        masks = masked.reshape(-1, size)
        nll = table[masks @ (1 << np.arange(size))]
        total += (weights.reshape(-1, size) * nll * masks).sum(axis=1)
    return total


def assert_mean(values: np.ndarray, expected: float) -> None:
    """The mean equals `expected` within 5 standard errors, which must be small enough to tell a wrong weight."""
    error = values.std() / len(values) ** 0.5
    assert error < 0.02 * abs(expected)
    assert abs(values.mean() - expected) < 5 * error + 1e-6 * abs(expected)


# --- the estimator ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("t_range", [(0.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("unit", ["block-stratified", "block-iid"])
@pytest.mark.parametrize("at_least_one", [True, False])
def test_single_view_is_the_elbo(size, t_range, unit, at_least_one):
    # Without at_least_one the variance diverges at t -> 0: the default t_min keeps it finite.
    t_min, t_max = t_range if at_least_one else (max(t_range[0], 0.001), t_range[1])
    spec = replace(
        SINGLE, at_least_one=at_least_one, t_min=t_min, t_max=t_max, is_stratified=unit == "block-stratified"
    )
    table = nll_table(size)
    noise = draw(spec, blocks_of(size, 100_000))
    assert_mean(block_losses(noise, size, table), expected_block_elbo(table, t_min, t_max))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("t_range", [(0.001, 0.999), (0.2, 0.8)])
def test_complementary_pair_is_twice_the_elbo(size, t_range):
    table = nll_table(size)
    noise = draw(replace(PAIR, t_min=t_range[0], t_max=t_range[1]), blocks_of(size, 100_000))
    assert_mean(block_losses(noise, size, table), 2 * expected_block_elbo(table, *t_range))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_count_noise_is_the_elbo(size):
    table = nll_table(size)
    losses = block_losses(draw(COUNT, blocks_of(size, 60_000)), size, table)
    assert_mean(losses, expected_block_elbo(table, 0.0, 1.0))


def test_count_noise_has_less_variance_than_bernoulli_noise():
    size, table = 4, nll_table(4)
    variances = [block_losses(draw(spec, blocks_of(size, 20_000)), size, table).var() for spec in (COUNT, SINGLE)]
    assert variances[0] < 0.5 * variances[1]


def test_units_shared_by_a_segment_are_the_elbo_over_many_samples():
    size, table, num_samples = 2, nll_table(2), 4000
    for unit, spread in (("document", "ordinal"), ("row", "row_key")):
        spec = replace(SINGLE, t_unit=unit)
        losses = [
            block_losses(draw(spec, blocks_of(size, 8), sample_id=i, **{spread: i}), size, table).mean()
            for i in range(num_samples)
        ]
        assert_mean(np.array(losses), expected_block_elbo(table, 0.0, 1.0))


@pytest.mark.parametrize("at_least_one", [True, False])
def test_distribution_of_masks_given_t(at_least_one):
    size, t, count = 3, 0.35, 200_000
    spec = replace(SINGLE, at_least_one=at_least_one, t_min=t, t_max=t)
    masks = draw(spec, blocks_of(size, count)).is_masked[0].reshape(-1, size)
    frequency = np.bincount(masks @ (1 << np.arange(size)), minlength=2**size) / count
    num = all_masks(size).sum(axis=1)
    expected = t**num * (1 - t) ** (size - num)
    if at_least_one:
        expected[0] = 0.0
        expected /= expected.sum()
    np.testing.assert_allclose(frequency, expected, atol=5 * (0.25 / count) ** 0.5)


@pytest.mark.parametrize("t", [0.0, 1e-9, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_first_masked_token_inverts_the_truncated_geometric(t, size):
    grid = 20_000
    u = (np.arange(grid) + 0.5) / grid
    first = first_masked(np.full(grid, t), u, np.full(grid, size))
    if t == 0.0:
        expected = np.full(size, 1 / size)
    else:
        expected = np.array([t * (1 - t) ** i for i in range(size)])
        expected /= expected.sum()
    np.testing.assert_allclose(np.bincount(first, minlength=size) / grid, expected, atol=2 / grid + 1e-6)


@pytest.mark.parametrize("size", [1, 4, 32])
@pytest.mark.parametrize(
    "spec",
    [SINGLE, replace(SINGLE, at_least_one=False, t_min=0.05), replace(PAIR, t_min=0.05, t_max=0.95)],
    ids=["at_least_one", "iid", "pair"],
)
def test_constant_nll_in_expectation(spec, size):
    noise = draw(spec, blocks_of(size, 200_000 // size))
    per_token = noise.loss_weights.sum(axis=0).reshape(-1, size).mean(axis=1) / spec.num_views
    assert_mean(3.7 * per_token, 3.7)


@pytest.mark.parametrize(
    "spec",
    [
        COUNT,
        replace(SINGLE, loss_weight="realised"),
        replace(SINGLE, loss_weight="realised", t_unit="document"),
        replace(PAIR, loss_weight="realised"),
        replace(PAIR, loss_weight="realised", t_unit="row"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_constant_nll_exactly(spec, size):
    loss_mask = np.random.default_rng(0).random(64) < 0.7
    for sample_id in range(50):
        noise = draw(spec, blocks_of(size, 64 // size), loss_mask, sample_id=sample_id, ordinal=sample_id)
        assert noise.loss_weights.sum() == pytest.approx(spec.num_views * loss_mask.sum(), rel=1e-6)


def test_realised_weight_without_at_least_one_falls_short_by_the_empty_block():
    size, table = 3, nll_table(3)
    spec = replace(SINGLE, loss_weight="realised", at_least_one=False)
    losses = block_losses(draw(spec, blocks_of(size, 100_000)), size, table)
    assert_mean(losses, size / (size + 1) * expected_block_elbo(table, 0.0, 1.0))


def test_realised_weight_is_counted_over_the_unit_of_t():
    loss_mask = np.arange(64) % 3 != 0
    for unit, span in (("block", 8), ("document", 64), ("row", 64)):
        noise = draw(replace(SINGLE, loss_weight="realised", t_unit=unit), blocks_of(8, 8), loss_mask)
        spans = zip(
            noise.is_masked[0].reshape(-1, span),
            noise.loss_weights[0].reshape(-1, span),
            loss_mask.reshape(-1, span),
            strict=True,
        )
        for masked, weights, maskable in spans:
            np.testing.assert_allclose(weights[masked], maskable.sum() / masked.sum(), rtol=1e-6)


def test_uniform_weight_is_one_where_masked():
    noise = draw(replace(SINGLE, loss_weight="uniform"), blocks_of(4, 16))
    np.testing.assert_array_equal(noise.loss_weights, noise.is_masked.astype(np.float32))


def test_block_of_one_token_is_the_sequential_nll():
    noise = draw(SINGLE, np.arange(1000))
    assert noise.is_masked.all()
    np.testing.assert_array_equal(noise.loss_weights, 1.0)


# --- purity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SINGLE, PAIR, COUNT])
def test_same_key_same_noise_whatever_was_drawn_before(spec):
    ids = blocks_of(4, 64)
    first = draw(spec, ids)
    np.random.seed(0)
    draw(PAIR, blocks_of(2, 9), seed=99, sample_id=1)
    np.random.random(100)
    second = draw(spec, ids.copy())
    for name in ("is_masked", "loss_weights", "t"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("spec", [SINGLE, PAIR, COUNT])
def test_every_part_of_the_key_matters(spec):
    ids = blocks_of(4, 64)
    keys = [
        {},
        {"seed": 8},
        {"epoch": 1},
        {"sample_id": 12},
        {"seed": 0, "epoch": 7},
        {"sample_id": 2**40},
        {"seed": 2**62},
    ]
    masks = [draw(spec, ids, **key).is_masked[0] for key in keys]
    for one, other in itertools.combinations(masks, 2):
        # Unrelated masks differ in a good share of 256 tokens, not in a few.
        assert (one != other).sum() > 60


def test_masks_of_samples_are_independent():
    spec = replace(SINGLE, at_least_one=False, t_min=0.5, t_max=0.5)
    masks = np.stack([draw(spec, blocks_of(64, 4), sample_id=i, ordinal=i).is_masked[0] for i in range(500)])
    correlation = np.corrcoef(masks.T)[np.triu_indices(256, 1)]
    assert np.abs(correlation).max() < 6 / 500**0.5
    across = np.corrcoef(masks)[np.triu_indices(500, 1)]
    assert np.abs(across).max() < 6 / 256**0.5


def test_known_values_do_not_drift():
    """A checkpoint resumed with another version must continue with the same noise."""
    noise = draw(SINGLE, blocks_of(4, 3))
    assert noise.is_masked[0].astype(int).tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1]
    np.testing.assert_allclose(noise.t[0, ::4], [0.90872514, 0.57539183, 0.24205847], rtol=1e-6)
    assert draw(COUNT, blocks_of(4, 3)).is_masked[0].astype(int).tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0]


# --- edges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_weight", ["elbo", "uniform", "realised"])
@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("at_least_one", [True, False])
@pytest.mark.parametrize("t", [0.0, 1e-300, 1e-17, 1.0 - 2**-53, 1.0])
def test_extreme_levels_are_finite(t, at_least_one, num_views, loss_weight):
    spec = replace(PAIR if num_views == 2 else SINGLE, at_least_one=at_least_one, t_min=t, t_max=t)
    spec = replace(spec, loss_weight=loss_weight)
    with np.errstate(all="raise", under="ignore"):
        noise = draw(spec, [0, 0, 0, 1, 1, 2], [1, 1, 1, 1, 0, 0])
    assert np.isfinite(noise.loss_weights).all() and np.isfinite(noise.t).all()
    if num_views == 2:
        np.testing.assert_array_equal(noise.is_masked.sum(axis=0), [1, 1, 1, 1, 0, 0])
    elif at_least_one and t < 0.5:
        assert noise.is_masked[0].tolist()[3:] == [True, False, False] and noise.is_masked[0, :3].sum() == 1
    elif t < 0.5:
        assert not noise.is_masked.any()
    else:
        assert noise.is_masked[0].tolist() == [True, True, True, True, False, False]
    if at_least_one and num_views == 1 and loss_weight == "elbo":
        # The limits of (1 - (1-t)^B) / t: B at 0 and 1 at 1.
        size = np.array([3, 3, 3, 1, 0, 0])
        expected_weights = size if t < 0.5 else np.ones(6)
        np.testing.assert_allclose(noise.loss_weights[0], np.where(noise.is_masked[0], expected_weights, 0), rtol=1e-6)


@pytest.mark.parametrize("spec", [SINGLE, PAIR, COUNT, replace(SINGLE, loss_weight="realised")])
@pytest.mark.parametrize("length", [0, 5])
def test_nothing_maskable(spec, length):
    noise = draw(spec, np.zeros(length), np.zeros(length))
    for array, dtype in ((noise.is_masked, np.bool_), (noise.loss_weights, np.float32), (noise.t, np.float32)):
        assert array.shape == (spec.num_views, length) and array.dtype == dtype and not array.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"t_unit": "token"}, "t_unit"),
        ({"loss_weight": "mean"}, "loss_weight"),
        ({"t_min": 0.9, "t_max": 0.1}, "t_min"),
        ({"t_max": 1.5}, "t_max"),
        ({"num_views": 0}, "num_views"),
        ({"num_views": 3, "view_relation": "complementary"}, r"num_views \(3\) must be even"),
        ({"view_relation": "paired"}, r"view_relation \(paired\)"),
        ({"is_count": True, "loss_weight": "uniform"}, "is_count"),
    ],
)
def test_specifications_that_no_configuration_gives_are_asserted(changes, message):
    with pytest.raises(AssertionError, match=message):
        replace(SINGLE, **changes)


def test_decreasing_block_ids_are_a_programming_error():
    with pytest.raises(AssertionError, match="block_ids"):
        draw(SINGLE, [1, 1, 0])


def test_specification_of_a_stage():
    stage = StageConfig(
        t_min=0.2, t_max=0.8, num_views=3, view_relation="independent", loss_weight="uniform", at_least_one=False
    )
    spec = NoiseSpec.for_stage(NoiseConfig(t_unit="row", is_stratified=False), stage)
    assert spec == NoiseSpec("row", False, False, "uniform", 0.2, 0.8, 3, "independent")

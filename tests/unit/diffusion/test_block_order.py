"""The tilt towards later tokens keeps the bound: checked against the chain rule over its random order, exactly."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from megatron_dllm.diffusion.block_order import (
    any_masked,
    first_masked_of,
    order_exponents,
    order_weights,
    tilted_levels,
)
from megatron_dllm.diffusion.loss_weights import _conditioned_weights
from megatron_dllm.diffusion.noise_masks import first_masked
from megatron_dllm.diffusion.segment_blocks import SegmentBlocks
from tests.unit.diffusion.test_noise import SINGLE, all_masks, assert_mean, block_losses, blocks_of, draw, nll_table


def expected_bound(g: np.ndarray, table: np.ndarray) -> float:
    """The mean over orders of the chain rule's NLL, with the tilt's probability of each order.

    Token i is written at the level s_i = u^(1/g_i), the largest first. Minus the logarithm of s_i is exponential with
    rate g_i, so the order is that of a race (Plackett and Luce): the next token is i with probability g_i over the sum
    of those that are left.
    """
    total = 0.0
    for order in itertools.permutations(range(len(g))):
        probability, loss, left = 1.0, 0.0, list(order)
        while left:
            probability *= g[left[0]] / g[left].sum()
            loss += table[sum(1 << token for token in left), left[0]]
            left = left[1:]
        total += probability * loss
    return total


@pytest.mark.parametrize("bias", [1.2, -1.2])
@pytest.mark.parametrize("t_unit", ["block", "document"])
def test_the_loss_is_the_bound_of_the_tilted_order(bias: float, t_unit: str) -> None:
    size, table = 3, nll_table(3)
    spec = replace(SINGLE, order_bias=bias, t_unit=t_unit)
    if t_unit == "block":
        losses = block_losses(draw(spec, blocks_of(size, 100_000)), size, table)
    else:
        ids = blocks_of(size, 50)
        drawn = [draw(spec, ids, sample_id=i, ordinal=i) for i in range(2000)]
        losses = np.array([block_losses(noise, size, table).mean() for noise in drawn])
    g = order_exponents(bias, SegmentBlocks.group(np.zeros(size, np.int64)))
    assert abs(expected_bound(g, table) - expected_bound(np.ones(size), table)) > 0.02, "the tilt must show"
    assert_mean(losses, expected_bound(g, table))


@pytest.mark.parametrize("at_least_one", [True, False])
@pytest.mark.parametrize("bias", [1.2, -3.0, 6.0])
def test_the_mean_over_all_levels_is_the_bound(bias: float, at_least_one: bool) -> None:
    """By quadrature, of every mask of a block by its probability at a level: also where draws vary without end."""
    size, nodes, table = 3, 20_000, nll_table(3)
    blocks, g = SegmentBlocks.group(blocks_of(size, nodes)), np.exp(-bias * (np.arange(size) / 2 - 0.5))
    # Even steps of x with t = x^power, in which the integrand, t^(g - 1) near 0, is smooth.
    power, x = 2.0 / g.min(), (np.arange(nodes) + 0.5) / nodes
    t, step = x**power, power * x ** (power - 1.0) / nodes
    probabilities = tilted_levels(bias, t, blocks)
    weights = order_weights(bias, t, blocks, at_least_one=at_least_one).reshape(nodes, size)
    drawn = any_masked(probabilities, blocks) if at_least_one else 1.0
    p, total = probabilities.reshape(nodes, size), 0.0
    for mask, nll in zip(all_masks(size)[1:], table[1:], strict=True):
        probability = np.where(mask, p, 1.0 - p).prod(axis=1) / drawn
        total += float((probability * (weights * nll * mask).sum(axis=1) * step).sum())
    assert total == pytest.approx(expected_bound(g, table), rel=1e-3)


def test_without_the_condition_the_bound_is_the_same() -> None:
    size, table = 3, nll_table(3)
    spec = replace(SINGLE, order_bias=0.6, at_least_one=False, t_min=1e-6)
    g = order_exponents(0.6, SegmentBlocks.group(np.zeros(size, np.int64)))
    assert_mean(block_losses(draw(spec, blocks_of(size, 400_000)), size, table), expected_bound(g, table))


def test_a_large_bias_is_the_order_of_the_text() -> None:
    table = nll_table(3)
    g = order_exponents(40.0, SegmentBlocks.group(np.zeros(3, np.int64)))
    left_to_right = table[0b111, 0] + table[0b110, 1] + table[0b100, 2]
    assert expected_bound(g, table) == pytest.approx(left_to_right, rel=1e-6)


def test_the_weights_of_every_token_add_up_to_one() -> None:
    size, nodes = 5, 4000
    blocks = SegmentBlocks.group(blocks_of(size, nodes))
    # Even steps of x = t^(1/4), where the integrand is smooth: t = x^4, dt = 4 x^3 dx.
    x = (np.arange(nodes) + 0.5) / nodes
    t = x**4
    for bias in (0.7, -2.0):
        g = order_exponents(bias, blocks)
        for at_least_one in (False, True):
            weights = order_weights(bias, t, blocks, at_least_one=at_least_one)
            probability = t[blocks.of_token] ** g
            if at_least_one:
                probability /= any_masked(probability, blocks)[blocks.of_token]
            share = (weights * probability * 4 * x[blocks.of_token] ** 3 / nodes).reshape(nodes, size).sum(axis=0)
            np.testing.assert_allclose(share, 1.0, rtol=1e-3)


def test_each_place_is_masked_as_often_as_its_exponent_says() -> None:
    size, count = 4, 100_000
    spec = replace(SINGLE, order_bias=1.5, at_least_one=False, t_min=1e-6)
    masked = draw(spec, blocks_of(size, count)).is_masked[0].reshape(-1, size)
    g = order_exponents(1.5, SegmentBlocks.group(np.zeros(size, np.int64)))
    np.testing.assert_allclose(masked.mean(axis=0), 1.0 / (1.0 + g), atol=5 * (0.25 / count) ** 0.5)


def test_at_least_one_token_is_masked_and_the_others_as_before() -> None:
    size, count, t = 3, 200_000, 0.3
    spec = replace(SINGLE, order_bias=2.0, t_min=t, t_max=t)
    masks = draw(spec, blocks_of(size, count)).is_masked[0].reshape(-1, size)
    frequency = np.bincount(masks @ (1 << np.arange(size)), minlength=2**size) / count
    p = t ** order_exponents(2.0, SegmentBlocks.group(np.zeros(size, np.int64)))
    every = np.arange(2**size)[:, None] >> np.arange(size) & 1
    expected = np.where(every, p, 1 - p).prod(axis=1)
    expected[0] = 0.0
    np.testing.assert_allclose(frequency, expected / expected.sum(), atol=5 * (0.25 / count) ** 0.5)


def test_no_bias_has_the_untilted_weights_and_first_tokens() -> None:
    blocks = SegmentBlocks.group(np.repeat(np.arange(200), np.tile([1, 4, 7, 2], 50)))
    t, u = np.random.default_rng(0).uniform(1e-6, 1.0, (2, len(blocks.size)))
    t[0] = 1.0
    weights = order_weights(0.0, t, blocks, at_least_one=True)
    np.testing.assert_allclose(weights, _conditioned_weights(t[None], blocks.size)[0, blocks.of_token], rtol=1e-9)
    np.testing.assert_array_equal(first_masked_of(t[blocks.of_token], u, blocks), first_masked(t, u, blocks.size))


def test_a_block_of_one_token_is_not_tilted() -> None:
    ids = np.arange(500)
    tilted, plain = draw(replace(SINGLE, order_bias=3.0), ids), draw(SINGLE, ids)
    np.testing.assert_array_equal(tilted.is_masked, plain.is_masked)
    np.testing.assert_allclose(tilted.loss_weights, plain.loss_weights, rtol=1e-6)

"""CART's weights: their closed forms, and the double sum over what the mask of the rows lets a token see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.row import Row
from megatron_dllm.diffusion.cart import cart_weights
from megatron_dllm.diffusion.roles import visible
from tests.unit.data.made_rows import make_row, spec

CART = spec(loss_weight="cart", t_min=0.0, t_max=1.0)
GEOMETRY = RowGeometry("block_diffusion", 4, 32, 128, 1)


def one_block(shown: np.ndarray, p: float = 0.3) -> np.ndarray:
    """Weights [n] of the tokens of a document of one block, of which some are visible."""
    places = np.arange(len(shown))
    return cart_weights(shown[None], np.zeros_like(places), places, p)[0]


def expected_weights(row: Row, p: float) -> list[float]:
    """The double sum, over the tokens that the mask lets each target see and that are not masked."""
    roles = torch.from_numpy(row.roles)
    sees = visible(roles, roles).numpy()
    found = []
    for slot in row.target_positions.tolist():
        distance = np.abs(row.position_ids - row.position_ids[slot])
        counts = sees[slot] & ~row.is_masked & (distance > 0)
        found.append(float((p * (1 - p) ** (distance[counts] - 1.0)).sum() / 2))
    return found


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("changes", [{}, {"block_size": 32}, {"block_origin": "row"}])
def test_weights_are_the_sum_over_what_a_token_sees(p: float, changes: dict) -> None:
    geometry = replace(GEOMETRY, **changes)
    for epoch in range(5):
        row = make_row([13, 6, 1, 22], geometry, replace(CART, cart_p=p), epoch=epoch)
        np.testing.assert_allclose(row.loss_weights, expected_weights(row, p), rtol=1e-5, atol=1e-7)
        assert len(row.target_ids) and (row.loss_weights <= 1.0).all()


@pytest.mark.parametrize("num_views", [1, 2])
def test_the_tokens_of_a_prompt_count(num_views: int) -> None:
    """Prompts whose noisy blocks are left out, prompts in an answer's block, and two turns in one block."""
    kinds = [0] * 6 + [1] * 5 + [0] * 3 + [1] * 8
    geometry = replace(GEOMETRY, num_views=num_views, turn_boundary="split_views", fill="eos")
    noise = spec(num_views, loss_weight="cart", t_min=0.0, t_max=1.0)
    row = make_row([22], geometry, noise, kinds=kinds)
    assert row.loss_weights.max() > 0.3
    np.testing.assert_allclose(row.loss_weights, expected_weights(row, 0.3), rtol=1e-5, atol=1e-7)


def test_documents_know_nothing_of_each_other() -> None:
    alone = make_row([14], GEOMETRY, CART, sample_ids=[200])
    together = make_row([14, 9], GEOMETRY, CART, sample_ids=[200, 500])
    mine = len(alone.loss_weights)
    np.testing.assert_array_equal(together.target_ids[:mine], alone.target_ids)
    np.testing.assert_array_equal(together.loss_weights[:mine], alone.loss_weights)


def test_everything_visible_weighs_one_and_nothing_visible_nothing() -> None:
    shown = np.ones(201, bool)
    shown[100] = False
    assert one_block(shown)[100] == pytest.approx(1.0, abs=1e-12)
    assert one_block(shown)[0] == pytest.approx(0.5, abs=0.02), "an end has one side"
    assert (one_block(np.zeros(9, bool)) == 0.0).all()


def test_large_and_small_p_count_neighbours_and_all() -> None:
    shown = np.random.default_rng(0).random(40) < 0.5
    neighbours = np.array([shown[max(i - 1, 0) : i].sum() + shown[i + 1 : i + 2].sum() for i in range(40)])
    np.testing.assert_allclose(one_block(shown, 1 - 1e-9), neighbours / 2, atol=1e-7)
    np.testing.assert_allclose(one_block(shown, 1e-9) / 1e-9, (shown.sum() - shown) / 2, rtol=1e-6)


def test_the_mean_over_masks_is_the_visible_share_less_what_the_ends_lack() -> None:
    """Of all masks of a block by their probability, where each token is masked with probability t."""
    size, t, p = 8, 0.3, 0.4
    shown = (np.arange(2**size)[:, None] >> np.arange(size) & 1) == 1
    probability = np.where(shown, 1 - t, t).prod(axis=1)
    places = np.arange(size)
    mean = probability @ cart_weights(shown, np.zeros_like(places), places, p)
    expected_mean = (1 - t) * (1 - ((1 - p) ** places + (1 - p) ** places[::-1]) / 2)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-12)


def test_a_mirrored_document_has_mirrored_weights() -> None:
    shown = np.random.default_rng(1).random(33) < 0.4
    np.testing.assert_allclose(one_block(shown[::-1]), one_block(shown)[::-1], rtol=1e-12)

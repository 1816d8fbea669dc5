"""Even work for context-parallel ranks, on rows of realistic document lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dllm.diffusion.context_deal import chunk_length, deal_row, load_ratio
from megatron_dllm.diffusion.roles import visible, visible_keys

CONTEXT = 4096


def _row(rng: np.random.Generator, length: int, block_size: int, num_views: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Roles of a row full of documents with log-normal lengths (median 665), and its masked tokens."""
    parts, used = [], 0
    for document in range(10_000):
        size = int(np.clip(rng.lognormal(6.5, 1.2), 8, CONTEXT))
        clean = (size - 1) // block_size * block_size
        if used + num_views * size + clean > length:
            size, clean = (length - used) // (num_views + 1), 0
            if size < 8:
                break
        blocks = np.arange(size) // block_size
        for view, n in [*((v, size) for v in range(1, num_views + 1)), (0, clean)]:
            parts.append(np.stack([np.full(n, document), blocks[:n], np.full(n, view)], 1))
        used += num_views * size + clean
    parts.append(np.tile([-1, 0, 0], (length - used, 1)))
    roles = np.concatenate(parts).astype(np.int32)
    return roles, (rng.random(length) < rng.uniform(0.1, 0.9)) & (roles[:, 2] > 0)


@pytest.mark.parametrize("num_views", [1, 2])
def test_visible_keys_count_the_mask(num_views: int) -> None:
    rng = np.random.default_rng(num_views)
    for block_size in (1, 4, 32, 4096):
        roles = torch.from_numpy(_row(rng, 1024, block_size, num_views)[0])
        keys = visible_keys(roles.numpy())
        assert np.array_equal(keys, visible(roles, roles).sum(-1).numpy())


@pytest.mark.parametrize("length", [8192, 32768])
@pytest.mark.parametrize("block_size", [32, 512, CONTEXT], ids=["block32", "block512", "document"])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("num_views", [1, 2])
def test_no_rank_has_more_than_five_percent_above_the_mean(
    length: int, block_size: int, num_ranks: int, num_views: int
) -> None:
    rng = np.random.default_rng(length + block_size + num_ranks)
    target_ratios, in_order_ratios = [], []
    for _ in range(6):
        roles, is_target = _row(rng, length, block_size, num_views)
        tokens = deal_row(roles, is_target, num_ranks)
        assert tokens.shape == (num_ranks, length // num_ranks)
        assert np.array_equal(np.sort(tokens.ravel()), np.arange(length))
        pairs = visible_keys(roles)
        assert load_ratio(pairs, tokens) <= 1.05
        target_ratios.append(load_ratio(is_target.astype(np.int64), tokens))
        in_order_ratios.append(load_ratio(pairs, np.arange(length).reshape(num_ranks, -1)))
    assert np.mean(target_ratios) < 1.15
    assert np.mean(in_order_ratios) > 1.1, "rows dealt in order are even already: the test says nothing"


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("block_size", [1, 4, 32, 64])
def test_small_noisy_blocks_stay_on_one_rank(block_size: int, num_views: int) -> None:
    """So only clean keys have to travel between the ranks."""
    rng = np.random.default_rng(block_size)
    for num_ranks in (2, 8):
        roles, is_target = _row(rng, 16384, block_size, num_views)
        owner = np.argsort(deal_row(roles, is_target, num_ranks).ravel()) // (16384 // num_ranks)
        is_noisy = roles[:, 2] > 0
        blocks = np.unique(roles[is_noisy], axis=0)
        assert len(np.unique(np.column_stack([roles, owner])[is_noisy], axis=0)) == len(blocks) > 100


def test_the_deal_is_the_same_wherever_it_is_computed() -> None:
    roles, is_target = _row(np.random.default_rng(0), 4096, 32)
    assert np.array_equal(deal_row(roles, is_target, 4), deal_row(roles.copy(), is_target.copy(), 4))


@pytest.mark.parametrize("length", [8, 48, 96, 6000])
def test_rows_of_any_length(length: int) -> None:
    roles, is_target = np.tile(np.array([-1, 0, 0]), (length, 1)), np.zeros(length, dtype=bool)
    assert np.array_equal(np.sort(deal_row(roles, is_target, 4).ravel()), np.arange(length))


def test_a_length_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row_length \(10\).*context_parallel_size \(4\)"):
        deal_row(np.zeros((10, 3), dtype=np.int32), np.zeros(10, dtype=bool), 4)


@pytest.mark.parametrize(
    ("tokens_per_rank", "expected"), [(4096, 128), (1024, 64), (2048, 128), (24, 1), (1, 1), (1500, 75)]
)
def test_chunks_divide_a_ranks_tokens(tokens_per_rank: int, expected: int) -> None:
    assert chunk_length(tokens_per_rank) == expected

"""Dealing a row's tokens to context-parallel ranks so that each has the same work.

The mask is a property of tokens, so any rank may hold any token: roles, positions and noise travel along. What
has to be even is the number of tokens (memory, experts, linear layers: exactly even), the number of visible
(query, key) pairs (attention) and the number of targets (LM head). Tokens move in chunks of neighbours, because
neighbours read the same keys.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.diffusion.roles import BLOCK, CLEAN_VIEW, DOC, VIEW

IntArray = NDArray[np.int64]

MAX_CHUNK = 128
# Chunks per rank below which evenness suffers more than locality gains.
MIN_CHUNKS_PER_RANK = 16
MAX_SWAPS = 64
# A deal is accepted once no rank has more than this times the mean of visible pairs; else with chunks half as long.
ACCEPTED_RATIO = 1.02
# What an uneven number of targets counts, relative to equally uneven pairs.
TARGET_WEIGHT = 0.25


def visible_keys(roles: NDArray[np.integer]) -> IntArray:
    """How many keys each token of a row sees, from its roles alone.

    Args:
        roles: [s, 3] integer roles (doc, block, view).

    Returns:
        [s] int64; 0 for padding. Their sum is `roles.count_visible_pairs`.
    """
    doc, block, view = (roles[:, index].astype(np.int64) for index in (DOC, BLOCK, VIEW))
    num_blocks = int(block.max()) + 1
    key = doc * num_blocks + block
    _, inverse, sizes = np.unique(key * (int(view.max()) + 1) + view, return_inverse=True, return_counts=True)
    clean = np.sort(key[(view == CLEAN_VIEW) & (doc >= 0)])
    earlier_clean = np.searchsorted(clean, key) - np.searchsorted(clean, doc * num_blocks)
    return np.where(doc >= 0, sizes[inverse] + earlier_clean, 0)


def chunk_length(tokens_per_rank: int, limit: int = MAX_CHUNK) -> int:
    """Neighbouring tokens that stay together: a divisor of `tokens_per_rank`, at most `limit`."""
    longest = max(1, min(limit, tokens_per_rank // MIN_CHUNKS_PER_RANK))
    return max(length for length in range(1, longest + 1) if tokens_per_rank % length == 0)


def deal_row(roles: NDArray[np.integer], is_target: NDArray[np.bool_], num_ranks: int) -> IntArray:
    """Which tokens of a row each rank holds: the same answer wherever it is computed.

    Chunks are dealt in order of falling cost to the rank with the least work that still has room, then exchanged
    between ranks as long as that evens out the work.

    Args:
        roles: [s, 3] integer roles of the row.
        is_target: [s] tokens that carry a loss.
        num_ranks: context-parallel ranks; must divide s.

    Returns:
        [num_ranks, s / num_ranks] int64 indexes into the row, ascending within a rank.
    """
    length = len(roles)
    if length % num_ranks:
        raise ValueError(f"row_length ({length}) must be a multiple of context_parallel_size ({num_ranks}).")
    pairs = visible_keys(roles)
    token_costs = np.stack([pairs / max(pairs.sum(), 1), TARGET_WEIGHT * is_target / max(is_target.sum(), 1)])
    chunk = chunk_length(length // num_ranks)
    while True:
        tokens = _deal_chunks_of(chunk, token_costs * num_ranks, num_ranks)
        if chunk == 1 or load_ratio(pairs, tokens) <= ACCEPTED_RATIO:
            return tokens
        chunk = chunk_length(length // num_ranks, chunk // 2)


def load_ratio(costs: IntArray, tokens: IntArray) -> float:
    """Most work of a rank over the mean: 1 is even. `costs` [s] per token, `tokens` [num_ranks, s / num_ranks]."""
    loads = costs[tokens].sum(1)
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def _deal_chunks_of(chunk: int, token_costs: NDArray[np.float64], num_ranks: int) -> IntArray:
    """[num_ranks, s / num_ranks] indexes of each rank's tokens, dealt in chunks; token_costs is [2, s]."""
    costs = token_costs.reshape(2, -1, chunk).sum(-1)
    owner = _deal_chunks(costs, num_ranks)
    _exchange_chunks(costs, owner, num_ranks)
    chunks = np.stack([np.flatnonzero(owner == rank) for rank in range(num_ranks)])
    return (chunks[..., None] * chunk + np.arange(chunk)).reshape(num_ranks, -1)


def _deal_chunks(costs: NDArray[np.float64], num_ranks: int) -> IntArray:
    """Longest-processing-time rule with equal counts; [n] owner of each chunk, from its costs [2, n]."""
    num_chunks = costs.shape[1]
    total = costs.sum(0)
    loads, room = np.zeros(num_ranks), np.full(num_ranks, num_chunks // num_ranks)
    owner = np.zeros(num_chunks, dtype=np.int64)
    for index in np.argsort(-total, kind="stable"):
        rank = int(np.argmin(np.where(room > 0, loads, np.inf)))
        owner[index] = rank
        loads[rank] += total[index]
        room[rank] -= 1
    return owner


def _exchange_chunks(costs: NDArray[np.float64], owner: IntArray, num_ranks: int) -> None:
    """Swap single chunks between the rank with the most of a cost and another, while the worst cost falls."""
    loads: NDArray[np.float64] = np.stack(
        [np.bincount(owner, weights=row, minlength=num_ranks) for row in costs]).astype(np.float64)
    for _ in range(MAX_SWAPS):
        if not _swap_once(costs, owner, loads):
            return


def _swap_once(costs: NDArray[np.float64], owner: IntArray, loads: NDArray[np.float64]) -> bool:
    """Do the swap with the busiest rank that helps most; false if none does. Changes owner and loads."""
    spread = loads.max(1) - loads.mean(1)
    busiest = int(loads[int(np.argmax(spread))].argmax())
    mine = np.flatnonzero(owner == busiest)
    others = np.flatnonzero(owner != busiest)
    # [2, mine, others] what moves from the busiest rank to the other by each swap.
    moved = costs[:, mine, None] - costs[:, None, others]
    before = _uneven(loads[:, busiest, None, None], loads[:, owner[others]][:, None], loads)
    after = _uneven(loads[:, busiest, None, None] - moved, loads[:, owner[others]][:, None] + moved, loads)
    gain = before - after
    best = int(gain.argmax())
    first, second = np.unravel_index(best, gain.shape)
    if gain[first, second] < 1e-4:
        return False
    chunk, other = mine[first], others[second]
    loads[:, busiest] -= moved[:, first, second]
    loads[:, owner[other]] += moved[:, first, second]
    owner[chunk], owner[other] = owner[other], owner[chunk]
    return True


def _uneven(first: NDArray[np.float64], second: NDArray[np.float64], loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distance of two ranks' loads from the mean, summed over the kinds of cost (leading dimension)."""
    mean = loads.mean(1)[:, None, None]
    return np.asarray(((first - mean) ** 2 + (second - mean) ** 2).sum(0))

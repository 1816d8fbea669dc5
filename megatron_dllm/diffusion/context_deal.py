"""Dealing a row's tokens to context-parallel ranks so that each has the same work.

The mask is a property of tokens, so any rank may hold any token: roles, positions and noise travel along. What
has to be even is the number of tokens (memory, experts, linear layers: exactly even), the number of visible
(query, key) pairs (attention) and the number of targets (LM head).

Tokens move in chunks of neighbours, because neighbours read the same keys. Where it can be done, a noisy block
stays whole: nobody else reads its keys, so only clean keys have to travel between the ranks.

In four steps, with chunks of 2 tokens of an AR document of 8 on two ranks (token i sees i + 1 keys):

    1 cut     [0 1] [2 3] [4 5] [6 7] with 3, 7, 11, 15 visible pairs
    2 deal    the costliest first, to the rank with less work: 15 | 11, then 15 | 18, then 18 | 18
    3 swap    chunks of equal length with the busiest rank while that evens out the work; here there is nothing to gain
    4 refine  if a rank still has more than ACCEPTED_RATIO: again from 1 with chunks half as long, and at last with
              noisy blocks divided
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.diffusion.roles import BLOCK, CLEAN_VIEW, DOC, VIEW, visible_keys

IntArray = NDArray[np.int64]

MAX_CHUNK = 128
# Chunks per rank below which evenness suffers more than locality gains.
MIN_CHUNKS_PER_RANK = 16
# Chunks per rank at which noisy blocks are rather divided than chunks made smaller still.
MAX_CHUNKS_PER_RANK = 64
MAX_SWAPS = 64
# Pairs of stretches looked at for one swap; above, only those of the least busy rank are.
MAX_SWAP_PAIRS = 1 << 16
# A deal is accepted once no rank has more than this times the mean of visible pairs; else with chunks half as long.
ACCEPTED_RATIO = 1.02
# What an uneven number of targets counts, relative to equally uneven pairs.
TARGET_WEIGHT = 0.25


def chunk_length(tokens_per_rank: int, limit: int = MAX_CHUNK) -> int:
    """Neighbouring tokens that stay together: a divisor of `tokens_per_rank`, at most `limit`."""
    longest = max(1, min(limit, tokens_per_rank // MIN_CHUNKS_PER_RANK))
    return max(length for length in range(1, longest + 1) if tokens_per_rank % length == 0)


def _chunk_lengths(tokens_per_rank: int, shortest: int) -> list[int]:
    """Falling chunk lengths to try, each at most half of the one before, down to `shortest` or just below."""
    lengths = [chunk_length(tokens_per_rank)]
    while lengths[-1] > shortest:
        lengths.append(chunk_length(tokens_per_rank, lengths[-1] // 2))
    return lengths


def deal_row(roles: NDArray[np.integer], is_target: NDArray[np.bool_], num_ranks: int) -> IntArray:
    """Which tokens of a row each rank holds: the same answer wherever it is computed.

    Chunks are dealt in order of falling cost to the rank with the least work that still has room, then exchanged
    between ranks as long as that evens out the work. If some rank still has too much, the chunks are made smaller,
    and at last noisy blocks are divided.

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
    # Two costs a token, pairs and targets, as shares of the row, so that they can be added.
    token_costs = np.stack([pairs / max(pairs.sum(), 1), TARGET_WEIGHT * is_target / max(is_target.sum(), 1)])
    tokens_per_rank = length // num_ranks
    # Step 4: the coarsest deal that is even enough wins. Whole noisy blocks are tried at every chunk length first.
    for keeps_blocks in (True, False):
        shortest = max(1, tokens_per_rank // MAX_CHUNKS_PER_RANK) if keeps_blocks else 1
        for chunk in _chunk_lengths(tokens_per_rank, shortest):
            owner = _deal_units(*_units(roles, chunk, keeps_blocks), token_costs * num_ranks, num_ranks)
            if owner is None:  # whole blocks do not fit, and smaller chunks would not make the blocks smaller
                break
            tokens = np.argsort(owner, kind="stable").reshape(num_ranks, -1)
            if load_ratio(pairs, tokens) <= ACCEPTED_RATIO or (chunk == 1 and not keeps_blocks):
                return tokens
    raise AssertionError("chunks of one token fill any rank")


def load_ratio(costs: IntArray, tokens: IntArray) -> float:
    """Most work of a rank over the mean: 1 is even. `costs` [s] per token, `tokens` [num_ranks, s / num_ranks]."""
    loads = costs[tokens].sum(1)
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def _units(roles: NDArray[np.integer], chunk: int, keeps_blocks: bool) -> tuple[IntArray, NDArray[np.bool_]]:
    """First token of each unit that is dealt, [n], and whether the unit must stay whole, [n].

    Units are about `chunk` tokens long. A whole one consists of noisy blocks of one view of one document.
    Padding, which costs nothing, is one unit.
    """
    place = np.arange(len(roles))
    if not keeps_blocks:
        # Every `chunk` tokens, wherever blocks lie; neighbouring chunks of padding become one unit.
        starts = place[::chunk]
        is_padding = np.asarray((roles[:, DOC] < 0).reshape(-1, chunk).all(axis=1))
        starts = starts[~is_padding | ~np.append(False, is_padding[:-1])]
        return starts, np.zeros(len(starts), dtype=np.bool_)
    # A copy (one view of one document) always begins a unit: its neighbours read other keys.
    is_noisy = (roles[:, VIEW] != CLEAN_VIEW) & (roles[:, DOC] >= 0)
    is_first = np.ones(len(roles), dtype=np.bool_)
    is_first[1:] = np.diff(roles[:, [DOC, VIEW]], axis=0).any(1)
    copy_start = np.maximum.accumulate(np.where(is_first, place, 0))
    is_block_first = is_first.copy()
    is_block_first[1:] |= np.diff(roles[:, BLOCK]) != 0
    # A token that may be cut off counts from itself, one that may not from the start of its block.
    counted_from = np.where(is_noisy, np.maximum.accumulate(np.where(is_block_first, place, 0)), place)
    # Inside a copy, a unit ends where `chunk` tokens are full. Blocks of 3, chunks of 4: noisy [0 1 2 3 4 5] [6 7 8],
    # since token 3 begins its block in the first window; clean [0 1 2 3] [4 5 6 7] [8].
    window = np.where(roles[:, DOC] >= 0, (counted_from - copy_start) // chunk, 0)
    is_first[1:] |= window[1:] != window[:-1]
    starts = np.flatnonzero(is_first)
    return starts, is_noisy[starts]


@dataclass
class _Stretch:
    """Neighbouring tokens [start, stop) that one rank holds."""

    start: int
    stop: int
    rank: int


def _deal_units(
    starts: IntArray, is_whole: NDArray[np.bool_], token_costs: NDArray[np.float64], num_ranks: int
) -> IntArray | None:
    """[s] rank of each token, with s / num_ranks tokens for each; None if the whole units do not fit.

    Args:
        starts: [n] first tokens of the units.
        is_whole: [n] units that must not be divided; they are dealt first, the others fill what is left.
        token_costs: [2, s] pairs and targets, each adding up to num_ranks times its weight.
        num_ranks: ranks.
    """
    length = token_costs.shape[1]
    # The cost of any stretch is a difference of two running sums.
    stops = np.append(starts[1:], length)
    summed = np.concatenate([np.zeros((2, 1)), token_costs.cumsum(1)], axis=1)
    costs = (summed[:, stops] - summed[:, starts]).sum(0)
    loads, room = np.zeros(num_ranks), np.full(num_ranks, length // num_ranks)
    stretches: list[_Stretch] = []
    # Step 2. Whole units first, while every rank has room for them; then by falling cost.
    for index in np.lexsort((-costs, ~is_whole)):
        start, stop = int(starts[index]), int(stops[index])
        while start < stop:
            fits = room >= (stop - start if is_whole[index] else 1)
            if not fits.any():
                return None
            # Of the ranks with room, the one with the least work; a unit that may be divided fills it up and goes on.
            rank = int(np.argmin(np.where(fits, loads, np.inf)))
            end = min(stop, start + int(room[rank]))
            stretches.append(_Stretch(start, end, rank))
            loads[rank] += (summed[:, end] - summed[:, start]).sum()
            room[rank] -= end - start
            start = end
    _exchange_stretches(stretches, summed, num_ranks)
    owner = np.empty(length, dtype=np.int64)
    for stretch in stretches:
        owner[stretch.start : stretch.stop] = stretch.rank
    return owner


def _exchange_stretches(stretches: list[_Stretch], summed: NDArray[np.float64], num_ranks: int) -> None:
    """Swap stretches of one length between the busiest rank and another, while that evens out the work."""
    starts, stops, owner = np.array([(stretch.start, stretch.stop, stretch.rank) for stretch in stretches]).T
    costs = summed[:, stops] - summed[:, starts]
    loads: NDArray[np.float64] = np.stack(
        [np.bincount(owner, weights=row, minlength=num_ranks) for row in costs]
    ).astype(np.float64)
    for _ in range(MAX_SWAPS):
        if not _swap_once(costs, stops - starts, owner, loads):
            break
    for stretch, rank in zip(stretches, owner, strict=True):
        stretch.rank = int(rank)


def _swap_once(costs: NDArray[np.float64], lengths: IntArray, owner: IntArray, loads: NDArray[np.float64]) -> bool:
    """Do the swap with the busiest rank that helps most; false if none does. Changes owner and loads."""
    spread = loads.max(1) - loads.mean(1)
    busiest = int(loads[int(np.argmax(spread))].argmax())
    mine = np.flatnonzero(owner == busiest)
    others = np.flatnonzero(owner != busiest)
    if len(mine) * len(others) > MAX_SWAP_PAIRS:
        others = np.flatnonzero(owner == int(loads.sum(0).argmin()))
    # [2, mine, others] what moves from the busiest rank to the other by each swap.
    moved = costs[:, mine, None] - costs[:, None, others]
    before = _uneven(loads[:, busiest, None, None], loads[:, owner[others]][:, None], loads)
    after = _uneven(loads[:, busiest, None, None] - moved, loads[:, owner[others]][:, None] + moved, loads)
    gain = np.where(lengths[mine, None] == lengths[None, others], before - after, -np.inf)
    first, second = np.unravel_index(int(gain.argmax()), gain.shape)
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

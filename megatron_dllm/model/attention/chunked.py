"""Tile by tile through torch's public scaled_dot_product_attention: any device, any dtype, no row-by-row mask.

The keys of a tile are its clean prefix followed by its own blocks; the mask is as wide as the tile.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from megatron_dllm.model.attention.dense import masked_attention
from megatron_dllm.model.attention.tiles import (
    Tile,
    TilePlan,
    build_tile_plan,
    restore_queries,
    sort_keys,
    sort_queries,
)

IS_COMPILED_PER_SHAPE = False
TILE_SIZE = 128
# A tile with more keys than this is computed again in backward instead of keeping its copy of the keys, so
# that what is kept grows linearly with the row.
MAX_KEPT_KEYS = 1024
# cuDNN's attention, torch's first choice on Hopper, builds a plan for every new shape, and each tile may be one: on an
# H100 twelve small batches took 69 s in bf16, and 4 s in fp32, which cuDNN does not take.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def build_plan(query_roles: Tensor, key_roles: Tensor, tile_size: int = TILE_SIZE) -> TilePlan:
    """Tiles of roles [b, q, 3] and [b, k, 3]."""
    return build_tile_plan(query_roles, key_roles, tile_size)


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: TilePlan, scale: float, max_kept_keys: int = MAX_KEPT_KEYS
) -> Tensor:
    """Softmax attention over the visible keys.

    Args:
        query: [b, n, q, d].
        key: [b, g, k, d], every one of the g groups serving n / g heads.
        value: [b, g, k, d].
        plan: see `build_plan`.
        scale: factor on the logits.
        max_kept_keys: a tile with more keys is computed again in backward.

    Returns:
        [b, n, q, d]; exactly 0, with zero gradients, where a query sees no key.
    """
    if not plan.tiles:
        # Zeros that autograd still connects with all inputs: a row of padding has gradients, of 0.
        nothing = sort_queries(query, plan) + key[:, :, :0].sum() + value[:, :, :0].sum()
        return restore_queries(nothing, plan, len(query), query.shape[2])
    # Splitting (not slicing) keeps backward linear: a slice's gradient is as long as what it was cut from.
    queries = sort_queries(query, plan).split([tile.queries[1] - tile.queries[0] for tile in plan.tiles], dim=1)
    keys = sort_keys(key, plan).split(plan.documents, dim=1)
    values = sort_keys(value, plan).split(plan.documents, dim=1)
    outs = []
    for tile, tile_query in zip(plan.tiles, queries, strict=True):
        inputs = (tile_query, keys[tile.document], values[tile.document], tile, scale)
        num_keys = tile.prefix[1] - tile.prefix[0] + sum(stop - start for start, stop in tile.own)
        if num_keys > max_kept_keys and torch.is_grad_enabled():
            outs.append(checkpoint(_attend_tile, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(_attend_tile(*inputs))
    return restore_queries(torch.cat(outs, dim=1), plan, len(query), query.shape[2])


def _attend_tile(query: Tensor, key: Tensor, value: Tensor, tile: Tile, scale: float) -> Tensor:
    """[n, q, d] queries of a tile, [g, k, d] keys and values of its document, to [n, q, d]."""
    spans = _merge([tile.prefix, *tile.own])
    key = torch.cat([key[:, start:stop] for start, stop in spans], dim=1)
    value = torch.cat([value[:, start:stop] for start, stop in spans], dim=1)
    mask = tile.mask
    if mask is not None:
        mask = F.pad(mask, (tile.prefix[1] - tile.prefix[0], 0), value=True)
    with _any_shape(query):
        return masked_attention(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), mask, scale).squeeze(0)


def _any_shape(query: Tensor) -> AbstractContextManager[None]:
    """Leave out kernels for which every shape costs time, on the device of `query` [...]."""
    return sdpa_kernel(KERNELS) if query.is_cuda else nullcontext()


def _merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans that touch: one slice is a view where two would be a copy."""
    merged: list[tuple[int, int]] = []
    for start, stop in spans:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged

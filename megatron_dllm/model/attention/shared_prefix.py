"""The fast backend on CPU: the queries of a tile share their clean prefix, and the parts are merged by lse.

A tile is up to three kinds of pieces: all its queries on the clean prefix (no mask), all of them on the clean
keys of the tile's own blocks, and each noisy view on its own noisy keys. Each piece is one call of torch's CPU
flash kernel, which returns the logsumexp (lse) of its logits; the softmax over all pieces follows from those.

Gradients need care, for three things go wrong in silence:
- the kernel's lse carries no gradient, so a merge in plain autograd loses part of dq and dk. Here one
  autograd.Function runs the kernel's backward on every piece with the *merged* output and lse, which is exact;
- a query that a piece's mask hides from every key gets lse 0 instead of -inf, which is put right here;
- two lse of -inf would merge to nan, so their common reference is kept finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dllm.model.attention.tiles import (
    Span,
    Tile,
    TilePlan,
    build_tile_plan,
    restore_queries,
    sort_keys,
    sort_queries,
)

IS_COMPILED_PER_SHAPE = False
TILE_SIZE = 64

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Piece:
    """One kernel call: a span of sorted queries on a span of sorted keys.

    Attributes:
        queries: span of the sorted queries.
        keys: span of the sorted keys.
        bias: [1, 1, q, k] fp32, 0 or -inf; None: all visible.
        is_hidden: [q] bool, queries that see no key of the piece; None: there are none.
    """

    queries: Span
    keys: Span
    bias: Tensor | None
    is_hidden: Tensor | None


@dataclass(frozen=True)
class PiecePlan:
    """The tiles of a micro-batch, each as (its queries, its pieces)."""

    tiles: TilePlan
    pieces: tuple[tuple[Span, tuple[Piece, ...]], ...]


def build_plan(query_roles: Tensor, key_roles: Tensor, tile_size: int = TILE_SIZE) -> PiecePlan:
    """Tiles of roles [b, q, 3] and [b, k, 3], cut into pieces."""
    plan = build_tile_plan(query_roles, key_roles, tile_size)
    starts = [0]
    for size in plan.documents:
        starts.append(starts[-1] + size)
    return PiecePlan(plan, tuple((tile.queries, tuple(_cut_tile(tile, starts[tile.document]))) for tile in plan.tiles))


def _cut_tile(tile: Tile, first_key: int) -> list[Piece]:
    start, stop = tile.queries
    pieces = []
    if tile.prefix[0] < tile.prefix[1]:
        pieces.append(Piece(tile.queries, _shift(tile.prefix, first_key), None, None))
    column = 0
    for span in tile.own:
        size = span[1] - span[0]
        mask = None if tile.mask is None else tile.mask[:, column : column + size]
        piece = _crop(mask, start, stop)
        if piece is not None:
            queries, mask = piece
            pieces.append(_masked_piece(queries, _shift(span, first_key), mask))
        column += size
    return pieces


def _crop(mask: Tensor | None, start: int, stop: int) -> tuple[Span, Tensor | None] | None:
    """The queries from the first to the last that see a key; None if none does."""
    if mask is None:
        return (start, stop), None
    rows = torch.nonzero(mask.any(dim=1)).flatten()
    if not len(rows):
        return None
    first, last = int(rows[0]), int(rows[-1]) + 1
    return (start + first, start + last), mask[first:last]


def _masked_piece(queries: Span, keys: Span, mask: Tensor | None) -> Piece:
    if mask is None or bool(mask.all()):
        return Piece(queries, keys, None, None)
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
    is_hidden = ~mask.any(dim=1)
    return Piece(queries, keys, bias[None, None], is_hidden if bool(is_hidden.any()) else None)


def _shift(span: Span, base: int) -> Span:
    return span[0] + base, span[1] + base


def attend(query: Tensor, key: Tensor, value: Tensor, plan: PiecePlan, scale: float) -> Tensor:
    """Softmax attention over the visible keys.

    Args:
        query: [b, n, q, d] on the CPU.
        key: [b, g, k, d], every one of the g groups serving n / g heads.
        value: [b, g, k, d].
        plan: see `build_plan`.
        scale: factor on the logits.

    Returns:
        [b, n, q, d]; exactly 0, with zero gradients, where a query sees no key.
    """
    out = _AttendPieces.apply(
        sort_queries(query, plan.tiles), sort_keys(key, plan.tiles), sort_keys(value, plan.tiles), plan, scale
    )
    return restore_queries(out, plan.tiles, len(query), query.shape[2])


class _AttendPieces(torch.autograd.Function):
    """Sorted queries [n, Q, d] and keys [g, K, d] to [n, Q, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: PiecePlan, scale: float) -> Tensor:
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:2], dtype=_accumulator_dtype(query), device=query.device)
        for tile_queries, pieces in plan.pieces:
            tile_out, tile_lse = _attend_tile(query, key, value, tile_queries, pieces, scale)
            out[:, slice(*tile_queries)], lse[:, slice(*tile_queries)] = tile_out, tile_lse
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, lse = ctx.saved_tensors
        accumulator = _accumulator_dtype(query)
        grads = [torch.zeros(tensor.shape, dtype=accumulator, device=tensor.device) for tensor in (query, key, value)]
        for _, pieces in ctx.plan.pieces:
            for piece in pieces:
                queries, keys = slice(*piece.queries), slice(*piece.keys)
                inputs = (
                    grad[:, queries],
                    query[:, queries],
                    key[:, keys],
                    value[:, keys],
                    out[:, queries],
                    lse[:, queries],
                )
                parts = _flash_backward(
                    *(tensor.unsqueeze(0) for tensor in inputs),
                    0.0,
                    False,
                    attn_mask=_bias(piece, query),
                    scale=ctx.scale,
                )
                for total, part, place in zip(grads, parts, (queries, keys, keys), strict=True):
                    total[:, place] += part.squeeze(0)
        grad_query, grad_key, grad_value = (total.to(query.dtype) for total in grads)
        return grad_query, grad_key, grad_value, None, None


def _attend_tile(
    query: Tensor, key: Tensor, value: Tensor, tile_queries: Span, pieces: tuple[Piece, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Output [n, q, d] and lse [n, q] of a tile's queries over all pieces."""
    total_out: Tensor | None = None
    total_lse: Tensor | None = None
    for piece in pieces:
        queries, keys = slice(*piece.queries), slice(*piece.keys)
        out, lse = _flash(
            query[:, queries].unsqueeze(0),
            key[:, keys].unsqueeze(0),
            value[:, keys].unsqueeze(0),
            0.0,
            False,
            attn_mask=_bias(piece, query),
            scale=scale,
        )
        out, lse = out.squeeze(0), lse.squeeze(0)
        if piece.is_hidden is not None:
            lse = lse.masked_fill(piece.is_hidden, float("-inf"))
        if total_out is None and piece.queries == tile_queries:
            total_out, total_lse = out.to(lse.dtype), lse
            continue
        if total_out is None or total_lse is None:
            shape = (query.shape[0], tile_queries[1] - tile_queries[0])
            total_out, total_lse = lse.new_zeros(*shape, query.shape[2]), lse.new_full(shape, float("-inf"))
        place = slice(piece.queries[0] - tile_queries[0], piece.queries[1] - tile_queries[0])
        _merge(total_out[:, place], total_lse[:, place], out, lse)
    assert total_out is not None and total_lse is not None, "a tile has at least one piece"
    return total_out, total_lse


def _merge(total_out: Tensor, total_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Fold a piece [.., q, d] with lse [.., q] into the total, in place."""
    merged = torch.logaddexp(total_lse, lse)
    reference = merged.masked_fill(merged == float("-inf"), 0.0)
    total_out.mul_((total_lse - reference).exp().unsqueeze(-1)).addcmul_(out, (lse - reference).exp().unsqueeze(-1))
    total_lse.copy_(merged)


def _bias(piece: Piece, query: Tensor) -> Tensor | None:
    return None if piece.bias is None else piece.bias.to(query.dtype)


def _accumulator_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32

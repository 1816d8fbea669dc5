"""Cuts a micro-batch into tiles: queries of neighbouring blocks of a document, and the keys they see.

All queries of a tile see the same clean prefix of their document, without a mask; only inside the tile's own
blocks is a mask needed. Its size is bounded by the tile, so nothing grows with the square of the row.

    1 sort   keys so that each query sees at most two intervals of them, and queries by document, block and view
    2 cut    the queries of a document where `tile_size` tokens of one view are full, at whole blocks
    3 split  a tile of a single block by view: then all its queries see the same keys, and it needs no mask
    4 span   for each tile, the clean prefix that all its queries see, and the keys that only some of them see

A document of blocks 0 to 3, 2 tokens each, one noisy view, tile_size 4: the tile of blocks 2 and 3 has the clean
blocks 0 and 1 as its prefix. Its own keys are the noisy blocks 2 and 3 and the clean block 2, which noisy block 2 must
not see: a mask of the tile's 6 queries and these 6 keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dllm.diffusion.roles import visible
from megatron_dllm.model.attention.plan import BLOCK_BITS, CLEAN_CODE, PADDING_CODE, VIEW_BITS, find_intervals

Span = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """Consecutive queries of a `TilePlan` and their keys.

    Attributes:
        document: index into the plan's documents; key spans count from that document's first key.
        queries: span of the sorted queries.
        prefix: span of clean keys that every query of the tile sees.
        own: spans of keys of the tile's own blocks, one per view; none overlaps the prefix.
        mask: [q, k] bool over the own keys in order of their spans; None: all visible.
    """

    document: int
    queries: Span
    prefix: Span
    own: tuple[Span, ...]
    mask: Tensor | None


@dataclass(frozen=True)
class TilePlan:
    """The tiles of a micro-batch of b rows, with the order in which they read its tokens.

    Attributes:
        query_order: [Q] int64, flat token (row * q + place) of each sorted query that sees a key.
        key_order: [K] int64, flat token of each sorted key; None where it is 0, 1, .. K - 1.
        num_keys: K, keys that are not padding.
        documents: number of keys of each document, in order; they add up to K.
        tiles: in order of their queries, which they cover without a gap.
    """

    query_order: Tensor
    key_order: Tensor | None
    num_keys: int
    documents: tuple[int, ...]
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class _Queries:
    """Sorted queries that see a key, as numpy columns of equal length; keys are numbered over all rows."""

    token: np.ndarray
    document: np.ndarray
    block: np.ndarray
    view: np.ndarray
    own: np.ndarray
    clean: np.ndarray

    def slice(self, start: int, stop: int) -> _Queries:
        return _Queries(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))


def build_tile_plan(query_roles: Tensor, key_roles: Tensor, tile_size: int) -> TilePlan:
    """Cut the queries of every document into tiles of whole blocks.

    Args:
        query_roles: [b, q, 3] integer roles.
        key_roles: [b, k, 3] integer roles.
        tile_size: tokens of one view in a tile; a block longer than that is a tile of its own.

    Returns:
        The plan, on the device of the roles.
    """
    device = query_roles.device
    query_roles, key_roles = query_roles.cpu(), key_roles.cpu()
    key_order, documents, first_key, queries = _sort(query_roles, key_roles)
    flat_query_roles, flat_key_roles = query_roles.flatten(0, 1), key_roles.flatten(0, 1)[torch.from_numpy(key_order)]
    # `order` collects the queries tile by tile; the backends read them in that order and put the results back.
    order, tiles = [], []
    done = 0
    for start, stop in _cut(queries, tile_size):
        for part in _split_single_block(queries.slice(start, stop)):
            part_order = np.lexsort((part.block, part.view))
            token = part.token[part_order]
            base = int(first_key[part.document[0]])
            prefix, own = _key_spans(part)
            # All queries of one block and view see the same keys: nothing to mask.
            is_one_block = part.block[0] == part.block[-1] and part.view[0] == part.view[-1]
            mask = None if is_one_block else _own_mask(flat_query_roles[torch.from_numpy(token)], flat_key_roles, own)
            tiles.append(
                Tile(
                    document=int(part.document[0]),
                    queries=(done, done + len(token)),
                    prefix=_shift(prefix, base),
                    own=tuple(_shift(span, base) for span in own),
                    mask=None if mask is None else mask.to(device),
                )
            )
            order.append(token)
            done += len(token)
    query_order = torch.from_numpy(np.concatenate(order) if order else np.zeros(0, np.int64))
    is_sorted = np.array_equal(key_order, np.arange(len(key_order)))
    return TilePlan(
        query_order=query_order.to(device),
        key_order=None if is_sorted else torch.from_numpy(key_order).to(device),
        num_keys=len(key_order),
        documents=documents,
        tiles=tuple(tiles),
    )


def _sort(query_roles: Tensor, key_roles: Tensor) -> tuple[np.ndarray, tuple[int, ...], np.ndarray, _Queries]:
    """Number the keys over all rows and describe each query that sees one, sorted by document and block."""
    found = find_intervals(query_roles, key_roles)
    # Padding sorts behind all keys and is dropped, so keys of all rows can be numbered one after the other.
    is_key = torch.gather(key_roles[..., 0], 1, found.key_order) >= 0
    num_row_keys = is_key.sum(1)
    row_start = torch.cumsum(num_row_keys, 0) - num_row_keys
    rows = torch.arange(len(key_roles)).unsqueeze(1)
    key_order = (found.key_order + rows * key_roles.shape[1])[is_key].numpy()
    # A document is known by its row and its number in the row, joined into one integer.
    doc = torch.gather(key_roles[..., 0], 1, found.key_order)
    key_docs = (doc.long() + rows * 2**32)[is_key].numpy()
    doc_ids, first_key, sizes = np.unique(key_docs, return_index=True, return_counts=True)

    # From here on queries: their codes hold document, view and block in bits (`plan`), taken apart again.
    sees_key = (found.own_stop > found.own_start) | (found.clean_stop > found.clean_start)
    sees_key &= found.query_codes != PADDING_CODE
    code = found.query_codes[sees_key].numpy()
    view = code >> BLOCK_BITS & CLEAN_CODE
    offset = row_start.unsqueeze(1)
    spans = {
        name: torch.stack([getattr(found, f"{name}_start") + offset, getattr(found, f"{name}_stop") + offset], dim=-1)[
            sees_key
        ].numpy()
        for name in ("own", "clean")
    }
    row = rows.expand(-1, query_roles.shape[1])[sees_key].numpy()
    document = np.searchsorted(doc_ids, (code >> BLOCK_BITS + VIEW_BITS) + row * 2**32)
    token = (torch.arange(query_roles.shape[1]) + rows * query_roles.shape[1])[sees_key].numpy()
    block = code & 2**BLOCK_BITS - 1
    order = np.lexsort((token, view, block, document))
    queries = _Queries(
        token=token[order],
        document=document[order],
        block=block[order],
        view=view[order],
        own=spans["own"][order],
        clean=spans["clean"][order],
    )
    return key_order, tuple(int(size) for size in sizes), first_key, queries


def _cut(queries: _Queries, tile_size: int) -> list[Span]:
    """Spans of queries of whole blocks, each within one document and about `tile_size` tokens a view."""
    if not len(queries.token):
        return []
    new_block = np.flatnonzero(np.diff(queries.document) | np.diff(queries.block)) + 1
    starts = np.concatenate([[0], new_block])
    stops = np.concatenate([new_block, [len(queries.token)]])
    is_new_document = np.diff(queries.document[starts], prepend=-1) != 0
    # Tokens of any one view up to here: the clean keys of earlier blocks stand for a block's distance.
    clean_stop, own_size = queries.clean[starts, 1], queries.own[starts, 1] - queries.own[starts, 0]
    spans = []
    start = 0
    for place in range(1, len(starts)):
        reach = max(clean_stop[place] - clean_stop[start] + own_size[place], (stops[place] - starts[start]) // 2)
        # Close the tile before this block if the block belongs to another document or would make the tile too long.
        if is_new_document[place] or reach > tile_size:
            spans.append((int(starts[start]), int(stops[place - 1])))
            start = place
    spans.append((int(starts[start]), int(stops[-1])))
    return spans


def _split_single_block(queries: _Queries) -> list[_Queries]:
    """A tile of one block needs no mask once its views are apart."""
    if queries.block[0] != queries.block[-1]:
        return [queries]
    edges = np.flatnonzero(np.diff(queries.view)) + 1
    return [queries.slice(start, stop) for start, stop in zip([0, *edges], [*edges, len(queries.token)], strict=True)]


def _key_spans(queries: _Queries) -> tuple[Span, tuple[Span, ...]]:
    """The clean prefix common to all queries, and per view the keys that some of them see besides."""
    # What the query that sees least of the clean copy sees, all see: the prefix. Beyond it, only some do.
    clean_start, prefix_stop = int(queries.clean[0, 0]), int(queries.clean[:, 1].min())
    own = []
    clean_stop = int(queries.clean[:, 1].max())
    for view in np.unique(queries.view):
        span = queries.own[queries.view == view]
        span = span[span[:, 1] > span[:, 0]]
        if not len(span):
            continue
        # Clean queries also see their own block, which continues the clean keys; a noisy view's keys lie elsewhere.
        if view == CLEAN_CODE:
            clean_stop = max(clean_stop, int(span[:, 1].max()))
        else:
            own.append((int(span[:, 0].min()), int(span[:, 1].max())))
    if clean_stop > prefix_stop:
        own.insert(0, (prefix_stop, clean_stop))
    return (clean_start, prefix_stop), tuple(own)


def _own_mask(query_roles: Tensor, key_roles: Tensor, own: tuple[Span, ...]) -> Tensor | None:
    if not own:
        return None
    mask = visible(query_roles, torch.cat([key_roles[start:stop] for start, stop in own]))
    return None if bool(mask.all()) else mask


def _shift(span: Span, base: int) -> Span:
    return span[0] - base, span[1] - base


def sort_queries(query: Tensor, plan: TilePlan) -> Tensor:
    """[b, n, q, d] to [n, Q, d]: the queries in the order of the tiles."""
    return query.transpose(0, 1).flatten(1, 2).index_select(1, plan.query_order)


def sort_keys(key: Tensor, plan: TilePlan) -> Tensor:
    """[b, g, k, d] to [g, K, d]: the keys in sorted order; a view of `key` where it is sorted already."""
    flat = key.transpose(0, 1).flatten(1, 2)
    return flat[:, : plan.num_keys] if plan.key_order is None else flat.index_select(1, plan.key_order)


def restore_queries(out: Tensor, plan: TilePlan, num_rows: int, row_length: int) -> Tensor:
    """[n, Q, d] in the order of the tiles back to [b, n, q, d], 0 where a query sees no key."""
    flat = out.new_zeros(out.shape[0], num_rows * row_length, out.shape[2]).index_copy(1, plan.query_order, out)
    return flat.unflatten(1, (num_rows, row_length)).transpose(0, 1)

"""What attention backends derive from token roles.

With the keys of a row sorted by (document, view, block), the clean view last, a query sees at most two
intervals of them: its own block in its own view, and the clean tokens of earlier blocks. Everything a
backend needs follows from those four numbers per query, whatever the order of the tokens in the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dllm.diffusion.roles import BLOCK, CLEAN_VIEW, DOC, VIEW

# A sort code has 63 bits: document, view, block. The clean view takes the highest code of its document.
BLOCK_BITS, VIEW_BITS, DOC_BITS = 32, 10, 20
BLOCK_OFFSET = 2 ** (BLOCK_BITS - 1)
CLEAN_CODE = 2**VIEW_BITS - 1
# Padding sorts behind every document and matches none.
PADDING_CODE = 2 ** (BLOCK_BITS + VIEW_BITS + DOC_BITS)


@dataclass(frozen=True)
class Intervals:
    """Where each query's visible keys lie among the sorted keys of its row; b rows, q queries, k keys.

    Attributes:
        key_order: [b, k] int64, the token at each sorted place; padding last.
        query_codes: [b, q] int64 sort codes of the queries (ascending: document, view, block).
        own_start: [b, q] int64, first key of the query's own view and block.
        own_stop: [b, q] int64, one past the last of them.
        clean_start: [b, q] int64, first clean key of the query's document.
        clean_stop: [b, q] int64, one past the last clean key of an earlier block.
        is_sorted: [] bool, whether `key_order` leaves the keys in place.
    """

    key_order: Tensor
    query_codes: Tensor
    own_start: Tensor
    own_stop: Tensor
    clean_start: Tensor
    clean_stop: Tensor
    is_sorted: Tensor


def sort_codes(roles: Tensor) -> Tensor:
    """One int64 per token whose order is (document, view, block), clean view last, padding behind all.

    Args:
        roles: [..., 3] integer roles; documents below 2^20, views in [0, 1023), any int32 block.

    Returns:
        [...] int64 codes; every padding token has PADDING_CODE.
    """
    roles = roles.long()
    doc, block, view = roles[..., DOC], roles[..., BLOCK], roles[..., VIEW]
    is_in_range = (doc < 2**DOC_BITS) & (view >= 0) & (view < CLEAN_CODE) & (block.abs() < BLOCK_OFFSET)
    torch._assert_async(
        (is_in_range | (doc < 0)).all(),
        "attention: roles must have doc below 2^20, view in [0, 1023) and block within int32",
    )
    view = torch.where(view == CLEAN_VIEW, CLEAN_CODE, view)
    return torch.where(doc >= 0, _code(doc, view, block + BLOCK_OFFSET), PADDING_CODE)


def _code(doc: Tensor, view: Tensor | int, block: Tensor | int) -> Tensor:
    return doc * 2 ** (BLOCK_BITS + VIEW_BITS) + view * 2**BLOCK_BITS + block


def find_intervals(query_roles: Tensor, key_roles: Tensor) -> Intervals:
    """Sort the keys of every row and find each query's two intervals; no host synchronisation.

    Args:
        query_roles: [b, q, 3] integer roles.
        key_roles: [b, k, 3] integer roles.

    Returns:
        The intervals; both are empty for padding queries.
    """
    key_codes, key_order = torch.sort(sort_codes(key_roles), dim=-1, stable=True)
    query_codes = sort_codes(query_roles)
    is_token = query_codes != PADDING_CODE
    doc = query_codes >> (BLOCK_BITS + VIEW_BITS)
    block = query_codes & (2**BLOCK_BITS - 1)

    def place(codes: Tensor) -> Tensor:
        return torch.where(is_token, torch.searchsorted(key_codes, codes), 0)

    positions = torch.arange(key_order.shape[-1], device=key_order.device)
    return Intervals(
        key_order=key_order,
        query_codes=query_codes,
        own_start=place(query_codes),
        own_stop=place(query_codes + 1),
        clean_start=place(_code(doc, CLEAN_CODE, 0)),
        clean_stop=place(_code(doc, CLEAN_CODE, block)),
        is_sorted=(key_order == positions).all(),
    )

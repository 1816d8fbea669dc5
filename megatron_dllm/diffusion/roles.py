"""Token roles, and the one predicate that is the attention mask of every stage.

A token carries three integers besides its id and position:

    doc    the document piece it belongs to inside its row; -1 is padding
    block  its block inside that document
    view   0 = clean copy, 1..k = noisy copies

AR, block diffusion (LLaDA2.0 Eq. 3), MDLM (Eq. 4), complementary views and decoding differ only in
the roles of the tokens that are present; none of them has a mask of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

DOC, BLOCK, VIEW = 0, 1, 2
PADDING_DOC = -1
CLEAN_VIEW = 0


def visible(query_roles: Tensor, key_roles: Tensor) -> Tensor:
    """Which keys each query attends to: the dense reference that every attention backend must equal.

    Args:
        query_roles: [..., q, 3] integer roles (doc, block, view) of the queries.
        key_roles: [..., k, 3] integer roles of the keys.

    Returns:
        [..., q, k] bool, true where the query sees the key. A padding query sees nothing.
    """
    query = query_roles.unsqueeze(-2)
    key = key_roles.unsqueeze(-3)
    same_document = (query[..., DOC] == key[..., DOC]) & (query[..., DOC] >= 0)
    same_block = (query[..., VIEW] == key[..., VIEW]) & (query[..., BLOCK] == key[..., BLOCK])
    earlier_clean = (key[..., VIEW] == CLEAN_VIEW) & (key[..., BLOCK] < query[..., BLOCK])
    return same_document & (same_block | earlier_clean)


def count_visible_pairs(roles: Tensor) -> int:
    """Number of (query, key) pairs that the mask allows, without building the mask.

    Every query sees its own block of its own view, and the clean tokens of earlier blocks.

    Args:
        roles: [..., s, 3] integer roles (doc, block, view) of whole rows, in any order inside a row.

    Returns:
        The sum of `visible(roles, roles)` over all rows.
    """
    rows = roles.reshape(roles.shape[:-2].numel(), *roles.shape[-2:]).long()
    row_ids = torch.arange(len(rows), device=roles.device).unsqueeze(-1).expand(rows.shape[:2])
    # Sorted by (row, doc, block, view), one line for the tokens of one block in one view, with their number.
    tokens = torch.cat([row_ids.unsqueeze(-1), rows], dim=-1)[rows[..., DOC] >= 0]
    groups, size = torch.unique(tokens, dim=0, return_counts=True)
    clean = torch.where(groups[:, 1 + VIEW] == CLEAN_VIEW, size, 0)
    clean_before = torch.cat([clean.new_zeros(1), clean.cumsum(0)])
    in_block, in_document = _first_of_run(groups[:, :3]), _first_of_run(groups[:, :2])
    earlier = clean_before[in_block] - clean_before[in_document]
    return int((size * (size + earlier)).sum())


def _first_of_run(keys: Tensor) -> Tensor:
    """[g] index of the first line equal to each line of the sorted `keys` [g, columns]."""
    _, run, length = torch.unique_consecutive(keys, dim=0, return_inverse=True, return_counts=True)
    first: Tensor = length.cumsum(0) - length
    return first[run]

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
    """Number of (query, key) pairs that the mask of `roles` [b, s, 3] allows, without building the mask.

    Every query sees its own block of its own view, and the clean tokens of earlier blocks.
    """
    total = 0
    for row in roles.reshape(-1, *roles.shape[-2:]).long():
        row = row[row[:, DOC] >= 0]
        if not len(row):
            continue
        own, inverse = torch.unique(row, dim=0, return_inverse=True)
        size = torch.bincount(inverse)
        total += int((size * size).sum())
        clean = torch.where(own[:, VIEW] == CLEAN_VIEW, size, torch.zeros_like(size))
        key = own[:, DOC] * (int(own[:, BLOCK].max()) + 2) + own[:, BLOCK]
        order = torch.argsort(key, stable=True)
        sorted_key, sorted_clean = key[order], clean[order]
        running = torch.cat([sorted_clean.new_zeros(1), sorted_clean.cumsum(0)])
        before_block = running[torch.searchsorted(sorted_key, key)]
        before_document = running[torch.searchsorted(sorted_key, own[:, DOC] * (int(own[:, BLOCK].max()) + 2))]
        total += int((size * (before_block - before_document)).sum())
    return total

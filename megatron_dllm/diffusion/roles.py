"""Token roles, and the one predicate that is the attention mask of every stage.

A token carries three integers besides its id and position:

    doc    the segment it belongs to inside its row; -1 is padding
    block  its block inside that document
    view   0 = clean copy, 1..k = noisy copies

AR, block diffusion (LLaDA2.0 Eq. 3), MDLM (Eq. 4), complementary views and decoding differ only in
the roles of the tokens that are present; none of them has a mask of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
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


def visible_keys(roles: NDArray[np.integer]) -> NDArray[np.int64]:
    """How many keys each token of a row sees, without building the mask.

    Args:
        roles: [s, 3] integer roles (doc, block, view).

    Returns:
        [s] int64; the sums over keys of `visible(roles, roles)`; 0 for padding.
    """
    doc, block, view = (roles[:, index].astype(np.int64) for index in (DOC, BLOCK, VIEW))
    num_blocks = int(block.max(initial=0)) + 1
    key = doc * num_blocks + block
    _, inverse, sizes = np.unique(key * (int(view.max(initial=0)) + 1) + view, return_inverse=True, return_counts=True)
    clean = np.sort(key[(view == CLEAN_VIEW) & (doc >= 0)])
    earlier_clean = np.searchsorted(clean, key) - np.searchsorted(clean, doc * num_blocks)
    return np.where(doc >= 0, sizes[inverse] + earlier_clean, 0)

"""Queries of chosen tokens only: the last layer's output is read where a token carries a loss, and nowhere else.

The chosen tokens are a flat list over the micro-batch, so their number is a shape that the host knows. Rows then
lie behind one another in one long row, their documents numbered apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dllm.diffusion.roles import DOC, PADDING_DOC

# The number of queries is rounded up to this fraction of the tokens for a kernel that is compiled per shape.
SHAPE_STEPS = 8


def select_queries(query: Tensor, rows: Tensor, is_rounded: bool) -> Tensor:
    """The queries of the chosen tokens.

    Args:
        query: [s, b, n, d].
        rows: [R] int64 indexes into the flattened [s * b] tokens.
        is_rounded: fill up with zeros so that few different numbers of queries occur.

    Returns:
        [q, 1, n, d], q >= R.
    """
    chosen = query.flatten(0, 1).index_select(0, rows).unsqueeze(1)
    if not is_rounded:
        return chosen
    step = max(1, query.shape[0] * query.shape[1] // SHAPE_STEPS)
    return F.pad(chosen, (0, 0, 0, 0, 0, 0, 0, -len(rows) % step))


def join_rows(tokens: Tensor) -> Tensor:
    """[k, b, g, d] to [b * k, 1, g, d], one row of the micro-batch behind the other."""
    return tokens.transpose(0, 1).flatten(0, 1).unsqueeze(1)


def select_roles(roles: Tensor, key_roles: Tensor, rows: Tensor, num_queries: int) -> tuple[Tensor, Tensor]:
    """Roles of the chosen queries and of the joined keys.

    Args:
        roles: [b, s, 3] of all queries.
        key_roles: [b, k, 3].
        rows: [R] int64 indexes into the flattened [s * b] queries.
        num_queries: q, at least R; the others become padding.

    Returns:
        [1, q, 3] and [1, b * k, 3].
    """
    stride = key_roles[..., DOC].max().clamp(min=0) + 1
    queries = _number_documents(roles, stride).transpose(0, 1).flatten(0, 1).index_select(0, rows)
    queries = F.pad(queries, (0, 0, 0, num_queries - len(rows)), value=PADDING_DOC)
    return queries.unsqueeze(0), _number_documents(key_roles, stride).flatten(0, 1).unsqueeze(0)


def _number_documents(roles: Tensor, stride: Tensor) -> Tensor:
    """The same roles with documents of different rows numbered apart."""
    doc = roles[..., DOC]
    shift = stride * torch.arange(len(roles), dtype=doc.dtype, device=doc.device).unsqueeze(1)
    numbered = roles.clone()
    numbered[..., DOC] = doc + (doc >= 0) * shift
    return numbered

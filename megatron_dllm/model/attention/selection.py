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


def num_selected(num_rows: int, num_tokens: int, is_rounded: bool) -> int:
    """How many queries the backend gets for `num_rows` of `num_tokens`; if rounded, few different numbers occur."""
    step = max(1, num_tokens // SHAPE_STEPS) if is_rounded else 1
    return num_rows + -num_rows % step


def select_queries(query: Tensor, rows: Tensor, num_queries: int) -> Tensor:
    """The queries of the chosen tokens, filled up with zeros.

    Args:
        query: [s, b, n, d].
        rows: [R] int64 indexes into the flattened [s * b] tokens.
        num_queries: q, at least R; see `num_selected`.

    Returns:
        [q, 1, n, d].
    """
    chosen = query.flatten(0, 1).index_select(0, rows).unsqueeze(1)
    return chosen if num_queries == len(rows) else F.pad(chosen, (0, 0, 0, 0, 0, 0, 0, num_queries - len(rows)))


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

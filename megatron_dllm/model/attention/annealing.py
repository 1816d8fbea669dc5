"""A mask that opens from causal to bidirectional, in rows of one-block documents (after DiffuLLaMA).

Each noisy copy of such a document sees itself alone. While the mask opens, token q of n sees token k where
k <= q + w, with the window w = floor(r n) and r the share that is open: at r = 0 the causal mask, at r = 1 all of it.

To a backend this is nothing new. Give the keys of a copy the roles of an autoregressive document, each token a clean
block of its own, and each query the block w further on: it sees its "own" block q + w and the "earlier" ones, which
is k <= q + w. So a query's keys stay an interval, and every backend and every layout computes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, PADDING_DOC, VIEW
from megatron_dllm.model.attention.backends import Backend
from megatron_dllm.model.attention.plan import find_intervals

# The column of a token's position, behind those of its role.
_POSITION = 3


@dataclass(frozen=True)
class Annealing:
    """How the mask of a stage opens.

    Attributes:
        steps: of the stage, over which it does.
        step: steps of the stage before this one.
    """

    steps: int
    step: int = 0

    def at(self, step: int) -> Annealing:
        """In the step after so many of the stage."""
        return replace(self, step=step)

    @property
    def share(self) -> float:
        """How much is open, r: 1 / steps in the first step, and 1 from the last of them on."""
        return min(1.0, (self.step + 1) / self.steps)


def placed(roles: Tensor, position_ids: Tensor) -> Tensor:
    """Roles with the tokens' places in their documents beside them, to travel where roles do.

    Args:
        roles: [b, s, 3] int32.
        position_ids: [b, s] positions in the documents.

    Returns:
        [b, s, 4] int32.
    """
    return torch.cat([roles, position_ids.unsqueeze(-1).to(roles.dtype)], dim=-1)


def window_roles(query: Tensor, key: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Roles by which `roles.visible` is the window.

    Args:
        query: [b, q, 4] int32, see `placed`; documents of one block.
        key: [b, k, 4] int32: every token that the queries may see at all.
        share: that is open.

    Returns:
        [b, q, 3] and [b, k, 3] int32 roles of queries and keys.
    """
    found = find_intervals(query, key)
    length = (found.own_stop - found.own_start).double()
    window = torch.floor(share * length).to(query.dtype)
    # Every copy is a document of its own.
    stride = torch.maximum(query[..., VIEW].max(), key[..., VIEW].max()) + 1
    return _in_order(query, stride, query[..., _POSITION] + window), _in_order(key, stride, key[..., _POSITION])


def _in_order(tokens: Tensor, stride: Tensor, block: Tensor) -> Tensor:
    """Clean roles [b, s, 3] of tokens [b, s, 4] in blocks [b, s], their copies as documents."""
    doc = torch.where(tokens[..., DOC] >= 0, tokens[..., DOC] * stride + tokens[..., VIEW], PADDING_DOC)
    return torch.stack([doc, block, torch.full_like(block, CLEAN_VIEW)], dim=-1)


def annealed_plan(backend: Backend, share: float, query: Tensor, key: Tensor) -> Any:
    """A backend's plan of the window.

    Args:
        backend: plans.
        share: that is open.
        query: [b, q, 4] int32, see `placed`.
        key: [b, k, 4] int32.
    """
    return backend.build_plan(*window_roles(query, key, share))

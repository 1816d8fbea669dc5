"""Attention across the context-parallel group by heads (Ulysses, Jacobs et al. 2023): tokens are exchanged for heads.

Each rank then attends with some heads to every token, so that the work is even whatever the mask. The traffic of a
rank falls with the number of ranks, which the number of heads bounds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _ExchangeParts(torch.autograd.Function):
    """Part i along dim 0 goes to rank i; the gradient takes the same way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received


def tokens_to_heads(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Give up heads for tokens, in one collective.

    Args:
        query: [s/cp, b, n, d] this rank's tokens.
        key: [s/cp, b, g, d]; with fewer than cp groups, each goes to cp / g ranks.
        value: [s/cp, b, g, d].
        group: context-parallel ranks; cp divides n, and divides g or is a multiple of it.

    Returns:
        [s, b, n/cp, d] queries and [s, b, max(1, g/cp), d] keys and values, tokens in rank order.
    """
    size = group.size()
    copies = max(1, size // key.shape[2])
    parts = [query, key.repeat_interleave(copies, 2), value.repeat_interleave(copies, 2)]
    split = [part.unflatten(2, (size, -1)) for part in parts]
    received = _ExchangeParts.apply(torch.cat(split, 3).movedim(2, 0), group)
    query, key, value = received.flatten(0, 1).split([part.shape[3] for part in split], 2)
    return query, key, value


def heads_to_tokens(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back: [s, b, n/cp, d] of every token to [s/cp, b, n, d] of this rank's tokens."""
    received = _ExchangeParts.apply(out.unflatten(0, (group.size(), -1)), group)
    return received.movedim(0, 2).flatten(2, 3)

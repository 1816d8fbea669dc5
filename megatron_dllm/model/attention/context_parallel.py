"""Keys and values across the context-parallel group: what must travel, and the collective that carries it.

Noisy keys are read by their own block alone. Where every noisy block lies on one rank, only the clean keys
travel: half of a row or less. Otherwise all keys do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, PADDING_DOC, VIEW
from megatron_dllm.model.attention.plan import PADDING_CODE, sort_codes

# The number of keys sent is rounded up to this fraction of a rank's tokens: a compiled kernel then meets few
# shapes.
SENT_STEPS = 8
# Sending more than this share of the tokens saves too little for the keys that then stand twice.
MAX_SENT_SHARE = 0.75


class _GatherSequence(torch.autograd.Function):
    """All-gather along dim 0; backward sums every rank's gradient of this rank's part."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(local, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = dist.get_world_size(ctx.group)
        if grad.is_cuda:
            local = grad.new_empty(grad.shape[0] // size, *grad.shape[1:])
            dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
            return local, None
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(size)[dist.get_rank(ctx.group)].contiguous(), None


def _all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = local.new_empty(local.shape[0] * dist.get_world_size(group), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered


def gather_roles(roles: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Roles [b, s/cp, 3] of every rank, in rank order: [b, s, 3]; columns behind the third come along."""
    return _all_gather(roles.transpose(0, 1), group).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class KeyExchange:
    """Which keys of this rank's s/cp tokens the other ranks get, the same number m on every rank.

    Attributes:
        group: the context-parallel group.
        sent: [m, b] int64 places of the tokens to send, rows filled up with place 0; None: all tokens.
        key_roles: [b, k, 3] int32 roles of the keys that `exchange` returns. Where only clean tokens travel,
            k is cp * m + s/cp: the clean tokens of all ranks, then this rank's own tokens, the clean ones among
            them as padding.
    """

    group: dist.ProcessGroup
    sent: Tensor | None
    key_roles: Tensor

    def exchange(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [s/cp, b, g, d] to those of every token this rank may see, [k, b, g, d]."""
        both = torch.stack([key, value], dim=1)
        if self.sent is None:
            both = _GatherSequence.apply(both, self.group)
        else:
            rows = torch.arange(both.shape[2], device=both.device)
            travelling = both.transpose(1, 2)[self.sent, rows].transpose(1, 2)
            both = torch.cat([_GatherSequence.apply(travelling, self.group), both])
        key, value = both.unbind(1)
        return key, value


def plan_exchange(roles: Tensor, group: dist.ProcessGroup) -> KeyExchange:
    """Agree with the other ranks on what travels; once per micro-batch, with one collective.

    Args:
        roles: [b, s/cp, 3] int32 roles of this rank's tokens; columns behind the third come along.
        group: the context-parallel group.

    Returns:
        The same decision on every rank.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    # On the host: the number of keys that travel is the shape of a tensor.
    whole_roles = gather_roles(roles, group).cpu()
    every = whole_roles.unflatten(1, (size, -1)).transpose(0, 1)
    num_sent = keys_to_send(whole_roles, size)
    if num_sent is None:
        return KeyExchange(group, None, whole_roles.to(roles.device))
    is_clean = _is_clean(every)
    # Clean tokens first, in their order; what lies behind them travels as padding.
    order = torch.argsort((~is_clean).int(), dim=-1, stable=True)[..., :num_sent]
    sent_roles = every.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, roles.shape[-1])).clone()
    sent_roles[..., DOC].masked_fill_(~is_clean.gather(2, order), PADDING_DOC)
    own_roles = every[rank].clone()
    own_roles[..., DOC].masked_fill_(is_clean[rank], PADDING_DOC)
    key_roles = torch.cat([sent_roles.transpose(0, 1).flatten(1, 2), own_roles], dim=1)
    return KeyExchange(group, order[rank].T.contiguous().to(roles.device), key_roles.to(roles.device))


def keys_to_send(roles: Tensor, size: int) -> int | None:
    """Keys that each rank sends of its rows, or None: all, because a noisy block is divided or little would be saved.

    Args:
        roles: [b, s, 3] int32 roles of whole rows, the tokens of the first rank first.
        size: context-parallel ranks.
    """
    length = roles.shape[1] // size
    step = max(1, length // SENT_STEPS)
    num_clean = int(_is_clean(roles).unflatten(1, (size, -1)).sum(-1).max())
    num_sent = -(-max(num_clean, 1) // step) * step
    return None if num_sent > MAX_SENT_SHARE * length or _has_divided_block(roles, length) else num_sent


def _is_clean(roles: Tensor) -> Tensor:
    """[...] whether each token of `roles` [..., 3] is of a clean copy."""
    return (roles[..., VIEW] == CLEAN_VIEW) & (roles[..., DOC] > PADDING_DOC)


def _has_divided_block(roles: Tensor, length: int) -> bool:
    """Whether a noisy block of the rows [b, s, 3] lies on more than one rank, each holding `length` tokens."""
    codes, order = torch.sort(sort_codes(roles), dim=1, stable=True)
    is_noisy = (roles[..., VIEW].gather(1, order) != CLEAN_VIEW) & (codes != PADDING_CODE)
    rank = order // length
    return bool(((codes[:, 1:] == codes[:, :-1]) & (rank[:, 1:] != rank[:, :-1]) & is_noisy[:, 1:]).any())

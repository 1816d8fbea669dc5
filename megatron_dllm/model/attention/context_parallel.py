"""Keys and values across the context-parallel group: gathered forward, their gradients summed back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherSequence(torch.autograd.Function):
    """All-gather along dim 0; backward sums every rank's gradient of this rank's part."""

    @staticmethod
    def forward(ctx, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(local, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        size = dist.get_world_size(ctx.group)
        if dist.get_backend(ctx.group) == "nccl":
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
    """Roles [b, s/cp, 3] of every rank, in rank order: [b, s, 3]."""
    return _all_gather(roles.transpose(0, 1), group).transpose(0, 1).contiguous()


def gather_keys(key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values [s/cp, b, g, d] of every rank, in rank order: [s, b, g, d] each, in one collective."""
    key, value = _GatherSequence.apply(torch.stack([key, value], dim=1), group).unbind(1)
    return key, value

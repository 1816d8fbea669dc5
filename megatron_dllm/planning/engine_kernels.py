"""Kernels of the GPU by their shapes: what they keep and compute, without compiling or running them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megatron_dllm.model.attention import flex
from megatron_dllm.model.attention.random_pairs import RandomPairs
from megatron_dllm.planning.engine_ledger import Ledger


@dataclass(frozen=True)
class ShapedFlex:
    """The flex backend, with a kernel that allocates and counts.

    Attributes:
        ledger: gets the kernel's operations.
        IS_COMPILED_PER_SHAPE: as of flex.
    """

    ledger: Ledger
    IS_COMPILED_PER_SHAPE: bool = True

    def build_plan(self, query_roles: Tensor, key_roles: Tensor, pairs: RandomPairs | None = None) -> flex.FlexPlan:
        """The plan of roles [b, q, 3] and [b, k, 3], or of [b, q, 5] and [b, k, 5] with random pairs."""
        return flex.build_plan(query_roles, key_roles, pairs=pairs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: flex.FlexPlan, scale: float) -> Tensor:
        """Output [b, n, q, d] of the given shapes, without values.

        Args:
            query: [b, n, q, d].
            key: [b, g, k, d].
            value: [b, g, k, d].
            plan: see `build_plan`.
            scale: ignored.
        """
        return flex.attend(query, key, value, plan, scale, kernel=partial(_kernel, self.ledger))


def _kernel(ledger: Ledger, query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """[b, n, q, d] of queries [b, n, q, d], keys and values [b, g, k, d]."""
    return _ShapedKernel.apply(query, key, value, ledger, _visited_pairs(block_mask))


def _visited_pairs(block_mask: BlockMask) -> int:
    """Pairs of query and key in the tiles that the kernel visits, over all rows."""
    tiles = block_mask.kv_num_blocks.sum()
    if block_mask.full_kv_num_blocks is not None:
        tiles = tiles + block_mask.full_kv_num_blocks.sum()
    return int(tiles) * block_mask.BLOCK_SIZE[0] * block_mask.BLOCK_SIZE[1]


class _ShapedKernel(torch.autograd.Function):
    """Keeps its inputs, its output and the log of the sum of each query, as the kernel does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ledger: Ledger, num_pairs: int) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        ctx.ledger, ctx.num_pairs = ledger, num_pairs
        ledger.flops += 4 * num_pairs * query.shape[1] * query.shape[3]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, _, lse = ctx.saved_tensors
        ctx.ledger.flops += 10 * ctx.num_pairs * query.shape[1] * query.shape[3]
        torch.empty_like(lse)  # sums of output times gradient, while the kernel runs
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def shaped_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """Torch's RMSNorm on CUDA, one kernel each way, without values.

    Args:
        hidden: [..., h].
        weight: [h].

    Returns:
        [..., h].
    """
    return _ShapedNorm.apply(hidden, weight)


class _ShapedNorm(torch.autograd.Function):
    """Keeps its input [..., h] and one fp32 number for each token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)

"""Backends with tiles small enough for short rows; flex by the kernel as torch computes it without compiling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from megatron_dllm.model.attention import chunked, dense, flex, shared_prefix
from megatron_dllm.model.attention.backends import Backend


def run_eagerly(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """A `flex.Kernel` that runs on the CPU, with gradients, by the element mask."""
    return flex_attention(query, key, value, lambda score, *_: score, block_mask.as_tuple(), scale, {})[0]


@dataclass(frozen=True)
class Functions:
    """A backend of two functions."""

    name: str
    build_plan: Any
    attend: Any
    IS_COMPILED_PER_SHAPE: bool = False


def small_backends(tile_size: int) -> dict[str, Backend]:
    """Every backend on the CPU, with gradients; long tiles are computed twice."""
    return {
        "dense": dense,
        "chunked": Functions(
            "chunked", partial(chunked.build_plan, tile_size=tile_size), partial(chunked.attend, max_kept_keys=20)
        ),
        "shared_prefix": Functions(
            "shared_prefix", partial(shared_prefix.build_plan, tile_size=tile_size), shared_prefix.attend
        ),
        "flex": Functions(
            "flex", partial(flex.build_plan, tile_size=tile_size), partial(flex.attend, kernel=run_eagerly), True
        ),
    }

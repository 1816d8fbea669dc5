"""FlexAttention's kernel as torch computes it without compiling: on the CPU, with gradients, by the element mask."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from megatron_dllm.model.attention import flex


def run_eagerly(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """Takes the place of `flex._run_kernel`."""
    return flex_attention(query, key, value, lambda score, *_: score, block_mask.as_tuple(), scale, {})[0]


def replace_kernel(monkeypatch: pytest.MonkeyPatch, tile_size: int) -> None:
    """Let the flex backend train on the CPU, with tiles small enough for short rows."""
    monkeypatch.setattr(flex, "_run_kernel", run_eagerly)
    monkeypatch.setattr(flex, "TILE_SIZE", tile_size)

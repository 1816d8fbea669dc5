"""RMSNorm over the features of all heads together, as OLMoE has it on queries and on keys.

megatron-core builds the norms of queries and keys for one head; the number of heads comes with the spec.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dllm.parallel.device import local_device


class HeadsNorm(torch.nn.Module):
    """x / rms(x) * weight over heads and features, computed in fp32 inside; heads may be split over tensor ranks.

    Every rank holds the whole weight, and its gradient is that of the rank's own heads: megatron-core sums the
    gradients of q_layernorm and k_layernorm over the tensor ranks, by their names.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        num_heads: int,
        tensor_group: ProcessGroup,
        eps: float = 1e-6,
        **_: Any,
    ) -> None:
        """Args: features of a head, heads of all tensor ranks, these ranks; the rest as megatron-core gives it."""
        super().__init__()
        self.eps = eps
        self._group = tensor_group
        size = num_heads * hidden_size
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=local_device()))

    def forward(self, heads: Tensor) -> Tensor:
        """Normalise `heads` [s, b, n/tp, d], the heads of this rank; same shape and dtype."""
        wide = heads.flatten(-2).float()
        squares = wide.square().sum(-1, keepdim=True)
        weight: Tensor = self.weight
        if self._group.size() > 1:
            # Every rank's output depends on every rank's heads, so the sum goes both ways.
            squares = reduce_from_tensor_model_parallel_region(squares, group=self._group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self._group)
            weight = weight.chunk(self._group.size())[self._group.rank()]
        normed = wide * torch.rsqrt(squares / len(self.weight) + self.eps)
        return (normed * weight).to(heads.dtype).view_as(heads)

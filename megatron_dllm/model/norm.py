"""RMSNorm for megatron-core's layer specs where TransformerEngine is missing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dllm.parallel.device import local_device


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 inside.

    megatron-core's own wrapper of torch's norm refuses sequence parallelism, and a mixture of experts with
    tensor parallelism does not train without it. Under sequence parallelism each rank sees a part of the
    tokens, so the weight's gradient has to be summed over the tensor ranks: the mark on the weight asks for it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=local_device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise `hidden` [..., hidden_size]; same shape and dtype."""
        if hidden.is_cuda:
            return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)  # one kernel each way
        return _FewerSaved.apply(hidden, self.weight, self.eps)


class _FewerSaved(torch.autograd.Function):
    """The same where torch composes it of small operations, each of which would keep a copy of the tokens.

    Those copies were two fifths of what a layer keeps for its backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden.float() * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad.float() * weight
        grad_hidden = grad.sub_(normed.mul_((grad * normed).mean(-1, keepdim=True))).mul_(scale)
        return grad_hidden.to(hidden.dtype), grad_weight, None

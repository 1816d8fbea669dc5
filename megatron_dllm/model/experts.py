"""All experts of a rank at once: SequentialMLP's parameters and checkpoints, without a module call per expert.

The tokens arrive sorted by expert. On CUDA with bf16 one grouped matrix product serves all experts; elsewhere
each expert that has tokens is one matrix product on its rows, written into place. (On CPU that was faster than
torch's grouped product, which wants the weights in one tensor, and than padding all experts to the busiest one.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_dllm.model.weights import weight_of


class BatchedExperts(SequentialMLP):
    """SequentialMLP (gated SiLU, no bias) whose forward pass computes its experts together."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take SequentialMLP's arguments."""
        super().__init__(*args, **kwargs)
        config = self.config
        assert config.gated_linear_unit and config.activation_func is F.silu and not config.add_bias_linear, \
            "BatchedExperts computes gated SiLU without bias"
        assert not (config.fp8 or config.fp4 or config.moe_apply_probs_on_input), \
            "BatchedExperts has neither fp8 nor probabilities on its input"

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor,
                permuted_probs: Tensor) -> tuple[Tensor, None]:
        """Send every token through its expert.

        Args:
            permuted_local_hidden_states: [m, h] tokens sorted by expert.
            tokens_per_expert: [e] int64, how many of them each local expert gets; 0 is allowed.
            permuted_probs: [m] factor on each token's output.

        Returns:
            [m, h] outputs (partial sums where the experts are split over tensor ranks), and no bias.
        """
        hidden = permuted_local_hidden_states
        if hidden.is_cuda and hidden.dtype == torch.bfloat16:
            product: Any = _GroupedProduct
            sections: Any = tokens_per_expert.to(hidden.device, non_blocking=True).cumsum(0).int()
        else:
            product, sections = _SectionProduct, tokens_per_expert.tolist()
        inner = product.apply(hidden, sections, *(weight_of(expert.linear_fc1) for expert in self.local_experts))
        inner = self._activate(inner, permuted_probs.unsqueeze(-1))
        return product.apply(inner, sections, *(weight_of(expert.linear_fc2) for expert in self.local_experts)), None

    def _activate(self, inner: Tensor, probs: Tensor) -> Tensor:
        """[m, 2f] (gate, up) and [m, 1] factors to [m, f]."""
        if self.config.bias_activation_fusion:
            return weighted_bias_swiglu_impl(inner, None, probs)
        gate, up = inner.chunk(2, dim=-1)
        return (F.silu(gate) * up * probs).to(inner.dtype)


class _SectionProduct(torch.autograd.Function):
    """Rows [m, k] in sections of `sizes` rows, each section times its own weight [n, k] transposed: [m, n]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], *weights: Tensor) -> Tensor:  # type: ignore[override]
        out = rows.new_empty(rows.shape[0], weights[0].shape[0])
        for weight, part, out_part in zip(weights, rows.split(sizes), out.split(sizes), strict=True):
            if len(part):
                torch.mm(part, weight.t(), out=out_part)
        ctx.save_for_backward(rows, *weights)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, *weights = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        # A tensor for every weight, of zeros where an expert had no token: the data-parallel wrapper waits for all.
        grad_weights = rows.new_empty(len(weights), *weights[0].shape)
        sections = zip(*(tensor.split(ctx.sizes) for tensor in (rows, grad, grad_rows)), strict=True)
        for weight, grad_weight, (part, grad_part, grad_rows_part) in zip(weights, grad_weights, sections, strict=True):
            if len(part):
                torch.mm(grad_part, weight, out=grad_rows_part)
                torch.mm(grad_part.t(), part, out=grad_weight)
            else:
                grad_weight.zero_()
        return grad_rows, None, *grad_weights.unbind(0)


class _GroupedProduct(torch.autograd.Function):
    """The same by torch's grouped product; `ends` [e] int32 on the device are the sections' ends.

    The kernel wants all weights in one tensor. It is put together in both directions and kept in neither:
    kept, it would be a second copy of the model.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows, ends, *weights)
        return F.grouped_mm(rows.contiguous(), torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, ends, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = F.grouped_mm(grad, torch.stack(weights), offs=ends)
        grad_weights = F.grouped_mm(grad.t(), rows.contiguous(), offs=ends)
        return grad_rows, None, *grad_weights.unbind(0)

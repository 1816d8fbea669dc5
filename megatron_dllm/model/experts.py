"""All experts of a rank at once: SequentialMLP's parameters and checkpoints, without a module call per expert.

The tokens arrive sorted by expert. Either one grouped matrix product serves all of them, or each expert that has
tokens computes its rows, written into place: the grouped product wants the weights in one tensor, which often costs
more than it gains (`model.paths` decides).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

# The module, not its functions: without CUDA `host` replaces the compiled ones, whoever imported this before.
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_dllm.model.weights import weight_of


class BatchedExperts(SequentialMLP):
    """SequentialMLP (gated SiLU, no bias) whose forward pass computes its experts together.

    Attributes:
        is_grouped: by one grouped product, else one expert after the other.
    """

    def __init__(self, *args: Any, is_grouped: bool, **kwargs: Any) -> None:
        """Take SequentialMLP's arguments, and how to compute."""
        super().__init__(*args, **kwargs)
        self.is_grouped = is_grouped
        config = self.config
        assert config.gated_linear_unit and config.activation_func is F.silu and not config.add_bias_linear, (
            "BatchedExperts computes gated SiLU without bias"
        )
        assert not (config.fp8 or config.fp4 or config.moe_apply_probs_on_input), (
            "BatchedExperts has neither fp8 nor probabilities on its input"
        )

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Send every token through its expert.

        Args:
            permuted_local_hidden_states: [m, h] tokens sorted by expert.
            tokens_per_expert: [e] int64, how many of them each local expert gets; 0 is allowed.
            permuted_probs: [m] factor on each token's output.

        Returns:
            [m, h] outputs (partial sums where the experts are split over tensor ranks), and no bias.
        """
        hidden, probs = permuted_local_hidden_states, permuted_probs.unsqueeze(-1)
        first = [weight_of(expert.linear_fc1) for expert in self.local_experts]
        second = [weight_of(expert.linear_fc2) for expert in self.local_experts]
        if self.is_grouped:
            return grouped_experts(hidden, probs, tokens_per_expert, first, second), None
        return _SectionExperts.apply(hidden, probs, tokens_per_expert.tolist(), *first, *second), None


def grouped_experts(
    rows: Tensor, probs: Tensor, sizes: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]
) -> Tensor:
    """Every token through its expert by one grouped product for each of the two layers.

    Args:
        rows: [m, h] tokens sorted by expert.
        probs: [m, 1] factor on each token's output.
        sizes: [e] tokens of each expert.
        first: e weights [2f, h].
        second: e weights [h, f].

    Returns:
        [m, h].
    """
    ends = sizes.to(rows.device, non_blocking=True).cumsum(0).int()
    inner = fused_bias_swiglu.weighted_bias_swiglu_impl(_GroupedProduct.apply(rows, ends, *first), None, probs)
    return _GroupedProduct.apply(inner, ends, *second)


class _SectionExperts(torch.autograd.Function):
    """Rows [m, h] in sections of `sizes` rows, each through its own expert: [m, h] times the factor `probs` [m, 1].

    Keeps the first product [m, 2f] alone; the activation and its gradients exist for one section at a time.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, probs: Tensor, sizes: list[int], *weights: Tensor) -> Tensor:
        first, second = weights[: len(sizes)], weights[len(sizes) :]
        inner = rows.new_empty(rows.shape[0], first[0].shape[0])
        out = rows.new_empty(rows.shape[0], second[0].shape[0])
        sections = zip(*(tensor.split(sizes) for tensor in (rows, probs, inner, out)), strict=True)
        for up, down, (part, factor, inner_part, out_part) in zip(first, second, sections, strict=True):
            if len(part):
                torch.mm(part, up.t(), out=inner_part)
                torch.mm(fused_bias_swiglu.weighted_swiglu(inner_part, factor), down.t(), out=out_part)
        ctx.save_for_backward(rows, probs, inner, *weights)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, probs, inner, *weights = ctx.saved_tensors
        sizes = ctx.sizes
        first, second = weights[: len(sizes)], weights[len(sizes) :]
        grad_rows, grad_probs = torch.empty_like(rows), torch.empty_like(probs)
        # A tensor for every weight, of zeros where an expert had no token: the data-parallel wrapper waits for all.
        grad_first = rows.new_empty(len(sizes), *first[0].shape)
        grad_second = rows.new_empty(len(sizes), *second[0].shape)
        sections = zip(
            *(tensor.split(sizes) for tensor in (rows, probs, inner, grad, grad_rows, grad_probs)), strict=True
        )
        experts = zip(first, second, grad_first, grad_second, sections, strict=True)
        for up, down, grad_up, grad_down, (part, factor, inner_part, grad_part, to_rows, to_probs) in experts:
            if not len(part):
                grad_up.zero_()
                grad_down.zero_()
                continue
            torch.mm(grad_part.t(), fused_bias_swiglu.weighted_swiglu(inner_part, factor), out=grad_down)
            grad_inner, grad_factor = fused_bias_swiglu.weighted_swiglu_back(
                torch.mm(grad_part, down), inner_part, factor
            )
            to_probs.copy_(grad_factor)
            torch.mm(grad_inner, up, out=to_rows)
            torch.mm(grad_inner.t(), part, out=grad_up)
        return grad_rows, grad_probs, None, *grad_first.unbind(0), *grad_second.unbind(0)


class _GroupedProduct(torch.autograd.Function):
    """Rows [m, k] in sections that end at `ends` [e] int32 (on the device), each times its weight [n, k] transposed.

    The kernel wants all weights in one tensor. It is put together in both directions and kept in neither:
    kept, it would be a second copy of the model.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, ends, *weights)
        return F.grouped_mm(rows.contiguous(), torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, ends, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = F.grouped_mm(grad, torch.stack(weights), offs=ends)
        grad_weights = F.grouped_mm(grad.t(), rows.contiguous(), offs=ends)
        return grad_rows, None, *grad_weights.unbind(0)

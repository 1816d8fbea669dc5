"""All experts of a rank at once, their weights in two parameters: SequentialMLP's checkpoints without its modules.

The tokens arrive sorted by expert. Either one grouped matrix product serves all of them, or each expert that has
tokens computes its rows, written into place (`model.paths` decides). The products want the weights of all experts in
one tensor, and everything that is done once a parameter (gradients, their sums over micro-batches, the optimizer) is
done twice a layer here, not twice for each of some hundred experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

# The module, not its functions: without CUDA `host` replaces the compiled ones, whoever imported this before.
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn


class BatchedExperts(MegatronModule):
    """Experts (gated SiLU, no bias) that are computed together.

    Attributes:
        weight1: [e, 2f, h] the first layers of the local experts: gates, then what they gate.
        weight2: [e, h, f] their second layers.
        is_grouped: by one grouped product, else one expert after the other.
    """

    def __init__(self, num_local_experts: int, config: Any, *args: Any, is_grouped: bool, **kwargs: Any) -> None:
        """Take SequentialMLP's arguments, whose first weights these are, and how to compute."""
        super().__init__(config=config)
        built = SequentialMLP(num_local_experts, config, *args, **kwargs)
        assert config.gated_linear_unit and config.activation_func is F.silu and not config.add_bias_linear, (
            "BatchedExperts computes gated SiLU without bias"
        )
        assert not (config.fp8 or config.fp4 or config.moe_apply_probs_on_input), (
            "BatchedExperts has neither fp8 nor probabilities on its input"
        )
        self.weight1 = _joined([expert.linear_fc1.weight for expert in built.local_experts])
        self.weight2 = _joined([expert.linear_fc2.weight for expert in built.local_experts])
        self.is_grouped = is_grouped
        self.ep_group, self.tp_group, self.dp_group = built.ep_group, built.tp_group, built.dp_group

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
        if self.is_grouped:
            return grouped_experts(hidden, probs, tokens_per_expert, self.weight1, self.weight2), None
        return _SectionExperts.apply(hidden, probs, tokens_per_expert.tolist(), self.weight1, self.weight2), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The two weights under the names and in the shapes that SequentialMLP's have in a checkpoint."""
        axis = len(sharded_offsets)
        expert = (axis, self.ep_group.rank(), self.ep_group.size())
        rank, size = self.tp_group.rank(), self.tp_group.size()
        replica = (0, 0, self.dp_group.rank())

        def part(key: str, tensor: Tensor, tensor_axis: int, number: int, of: int, replica_id: Any) -> ShardedTensor:
            place = (axis + tensor_axis, number, of)
            return ShardedTensor.from_rank_offsets(
                key, tensor, *sharded_offsets, expert, place, replica_id=replica_id, prepend_axis_num=axis
            )

        def split(key: str, weight: Tensor, replica_id: Any, _: Any) -> list[ShardedTensor]:
            # Each tensor rank holds a part of the gates and the same part of what they gate.
            gates, ups = weight.chunk(2, dim=1)
            return [part(key, t, 1, rank + i * size, 2 * size, replica_id) for i, t in enumerate((gates, ups))]

        first, second = (f"{prefix}experts.linear_fc{number}.weight" for number in (1, 2))
        join = torch.no_grad()(lambda halves: torch.cat(halves, dim=1))
        return {
            f"{prefix}weight1": ShardedTensorFactory(first, self.weight1, split, join, replica),
            f"{prefix}weight2": part(second, self.weight2, 2, rank, size, replica),
        }


def _joined(weights: Sequence[nn.Parameter]) -> nn.Parameter:
    """One parameter [e, ...] of e weights [...], with the marks that megatron-core's layers put on each."""
    joined = nn.Parameter(torch.stack([weight.data for weight in weights]))
    for name, mark in vars(weights[0]).items():
        setattr(joined, name, mark + 1 if name == "partition_dim" else mark)
    return joined


def grouped_experts(rows: Tensor, probs: Tensor, sizes: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Every token through its expert by one grouped product for each of the two layers.

    Args:
        rows: [m, h] tokens sorted by expert.
        probs: [m, 1] factor on each token's output.
        sizes: [e] tokens of each expert.
        first: [e, 2f, h].
        second: [e, h, f].

    Returns:
        [m, h].
    """
    ends = sizes.to(rows.device, non_blocking=True).cumsum(0).int()
    inner = fused_bias_swiglu.weighted_bias_swiglu_impl(_GroupedProduct.apply(rows, ends, first), None, probs)
    return _GroupedProduct.apply(inner, ends, second)


class _SectionExperts(torch.autograd.Function):
    """Rows [m, h] in sections of `sizes` rows, each through its own expert: [m, h] times the factor `probs` [m, 1].

    Keeps the first product [m, 2f] alone; the activation and its gradients exist for one section at a time.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, probs: Tensor, sizes: list[int], first: Tensor, second: Tensor) -> Tensor:
        inner = rows.new_empty(rows.shape[0], first.shape[1])
        out = rows.new_empty(rows.shape[0], second.shape[1])
        sections = zip(*(tensor.split(sizes) for tensor in (rows, probs, inner, out)), strict=True)
        for up, down, (part, factor, inner_part, out_part) in zip(first, second, sections, strict=True):
            if len(part):
                torch.mm(part, up.t(), out=inner_part)
                torch.mm(fused_bias_swiglu.weighted_swiglu(inner_part, factor), down.t(), out=out_part)
        ctx.save_for_backward(rows, probs, inner, first, second)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, probs, inner, first, second = ctx.saved_tensors
        sizes = ctx.sizes
        grad_rows, grad_probs = torch.empty_like(rows), torch.empty_like(probs)
        grad_first, grad_second = torch.empty_like(first), torch.empty_like(second)
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
        return grad_rows, grad_probs, None, grad_first, grad_second


class _GroupedProduct(torch.autograd.Function):
    """Rows [m, k] in sections that end at `ends` [e] int32 (on the device), times weights [e, n, k] transposed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, ends, weight)
        return F.grouped_mm(rows.contiguous(), weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, ends, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = F.grouped_mm(grad, weight, offs=ends)
        return grad_rows, None, F.grouped_mm(grad.t(), rows.contiguous(), offs=ends)

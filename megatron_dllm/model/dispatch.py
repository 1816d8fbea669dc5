"""Tokens to their experts and back by gathers alone: megatron-core's all-to-all dispatcher with another way to reorder.

megatron-core's own reordering adds rows up in memory (index_add, scatter_add). On CUDA these are atomic additions in
bf16: slow, rounded at every one of a token's k experts, and in another order in every run, so that no run could be
repeated to the last bit. Here every token knows the k places of its copies; both directions read what they want:

    permute     row j of the output is the token of copy j;      its gradient: each token adds up its k copies
    combine     each token adds up its k copies, in fp32;        its gradient: row j is the gradient of copy j's token
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn

from megatron_dllm.model.experts import BatchedExperts
from megatron_dllm.model.fused import fused


@dataclass(frozen=True)
class CopyOrder:
    """Where the copies of tokens lie when they are sorted by expert, and by token within an expert.

    Attributes:
        experts: [T, k] int64 the experts of each token, ascending.
        places: [T, k] int64 the places of its copies for them.
        tokens: [T k] int64 the token of the copy at each place.
        copies: [T k] int64 which of all T k copies, counted token by token, lies at each place.
    """

    experts: Tensor
    places: Tensor
    tokens: Tensor
    copies: Tensor

    @classmethod
    def of(cls, routing_map: Tensor, copies: int) -> CopyOrder:
        """Of a routing map, without waiting for the device.

        Args:
            routing_map: [T, e] bool, `copies` experts in every row.
            copies: k.
        """
        tokens, experts_of_all = routing_map.shape
        # Expert by expert, the number of copies up to each entry of the map is the place of its copy, counted from 1.
        counts = routing_map.t().flatten().cumsum(0, dtype=torch.int32).view(experts_of_all, tokens)
        experts = torch.nonzero_static(routing_map, size=tokens * copies)[:, 1].view(tokens, copies)
        places = counts.t().gather(1, experts).long() - 1
        numbers = torch.arange(tokens * copies, device=routing_map.device)
        order = torch.empty_like(numbers).scatter_(0, places.flatten(), numbers)
        return cls(experts, places, order // copies, order)


@fused
def _add_copies(rows: Tensor, places: Tensor) -> Tensor:
    """[T, h] the sum in fp32 of the rows [m, h] at `places` [T, k], in the precision of `rows`."""
    return rows[places].sum(1, dtype=torch.float32).to(rows.dtype)


class _Permute(torch.autograd.Function):
    """Tokens [T, h] and probabilities [T, k] of their copies: [T k, h] and [T k] in the order of their places."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, probs: Tensor, order: CopyOrder) -> tuple[Tensor, Tensor]:
        ctx.places = order.places
        return tokens.index_select(0, order.tokens), probs.flatten().index_select(0, order.copies)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_probs: Tensor) -> tuple[Tensor, Tensor, None]:
        return _add_copies(grad_rows.contiguous(), ctx.places), grad_probs[ctx.places], None


class _Combine(torch.autograd.Function):
    """Copies [T k, h] in the order of their places: the sum [T, h] of each token's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: CopyOrder) -> Tensor:
        ctx.tokens = order.tokens
        return _add_copies(rows.contiguous(), order.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.tokens), None


def permute(tokens: Tensor, probs: Tensor, order: CopyOrder) -> tuple[Tensor, Tensor]:
    """A copy of every token for each of its experts.

    Args:
        tokens: [T, h].
        probs: [T, k] of each token's copies, by expert.
        order: where the copies lie.

    Returns:
        [T k, h] copies and [T k] their probabilities, sorted by expert.
    """
    return _Permute.apply(tokens, probs, order)


def combine(rows: Tensor, order: CopyOrder) -> Tensor:
    """The sums [T, h] of each token's copies, of rows [T k, h] sorted by expert."""
    return _Combine.apply(rows, order)


class GatherDispatcher(MoEAlltoAllTokenDispatcher):
    """megatron-core's dispatcher with the reorderings of this file.

    Attributes:
        is_alone: one rank has all experts: nothing is sent, and tokens sorted by expert are in place already.
        stays_on_device: nobody asks how many tokens an expert has, so the host need not wait to know.
    """

    def __init__(self, *args: Any, is_grouped: bool, **kwargs: Any) -> None:
        """Take megatron-core's arguments, and whether the experts are one grouped product."""
        super().__init__(*args, **kwargs)
        assert not (self.drop_and_pad or self.config.moe_expert_capacity_factor), "no token is dropped or padded"
        assert not self.config.moe_router_padding_for_quantization, "no routing map is padded"
        self.is_alone = self.ep_size * self.tp_size == 1
        self.stays_on_device = self.is_alone and is_grouped

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        if self.stays_on_device:
            return tokens_per_expert
        return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of every token for each of its experts, sorted by expert.

        Args:
            hidden_states: [s, b, h].
            routing_map: [s b, e] bool.
            probs: [s b, e].

        Returns:
            [s b k, h] copies and [s b k] their probabilities.
        """
        self.hidden_shape, self.routing_map, self.probs = hidden_states.shape, routing_map, probs
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        self.tokens_per_expert = self.preprocess(routing_map)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        self.order = CopyOrder.of(routing_map, self.config.moe_router_topk)
        return permute(tokens, probs.gather(1, self.order.experts), self.order)

    def dispatch_postprocess(self, global_input_tokens: Tensor, global_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [m, h] as they arrived, sorted by local expert, with how many each has, and probabilities [m]."""
        if not self.is_alone:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        for point in ("before_permutation_2", "before_finish"):
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize(point, self.tokens_per_expert)
        return global_input_tokens, self.tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Outputs [m, h] of the local experts in the order in which their tokens arrived."""
        return hidden_states if self.is_alone else super().combine_preprocess(hidden_states)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """The outputs [s b k, h] of every token's experts, added up: [s, b, h]."""
        return combine(permutated_local_input_tokens, self.order).view(self.hidden_shape)


def use_gathers(model: nn.Module) -> None:
    """Put this file's dispatcher in the place of megatron-core's all-to-all one, in every layer of experts.

    It is put there after the layers are built: megatron-core hands its process groups to its own classes alone.
    """
    for layer in model.modules():
        if isinstance(layer, MoELayer) and type(layer.token_dispatcher) is MoEAlltoAllTokenDispatcher:
            assert not layer.shared_expert_overlap, "the shared experts know the other dispatcher"
            layer.token_dispatcher = GatherDispatcher(
                layer.num_local_experts,
                layer.local_expert_indices,
                config=layer.config,
                pg_collection=get_default_pg_collection(),
                is_grouped=isinstance(layer.experts, BatchedExperts) and layer.experts.is_grouped,
            )

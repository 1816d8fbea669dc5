"""What one layer costs on one rank for one micro-batch: products, attention, kept bytes, bytes exchanged.

Bytes are those of bf16 on the path of a GPU, each term with its reason, and twice as many in fp32. Everything is linear
in the tokens of the micro-batch, so a pipeline rank is a sum over the kinds of its layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.planning.parameters import attention_weights, expert_tensor_size


@dataclass(frozen=True)
class Tokens:
    """Of a micro-batch, on one context rank.

    Attributes:
        computed: tokens whose keys and values a layer computes.
        read: those whose output is read: all, or in the last layer the targets.
        pairs: of query and key that attention computes, where all outputs are read.
    """

    computed: float
    read: float
    pairs: float


@dataclass(frozen=True)
class LayerCost:
    """Of one layer, one rank and one micro-batch.

    Attributes:
        products: floating point operations of matrix products in the forward pass.
        attention: of attention in the forward pass.
        kept: bytes kept for the backward pass.
        recomputed: of these, what recomputing attention alone does not keep.
        kept_by_mlp: of these, those of the MLP or the experts.
        working: bytes that its backward pass holds for a moment: gradients of activations and of the experts' weights.
        input: bytes of the layer's input.
        exchanged: bytes sent to the experts and back in the forward pass, this rank's own included.
        gathered: bytes gathered and scattered between tensor ranks in the forward pass.
        contexts: bytes of keys and values that come from the other context ranks.
    """

    products: float
    attention: float
    kept: float
    recomputed: float
    kept_by_mlp: float
    working: float
    input: float
    exchanged: float
    gathered: float
    contexts: float


def layer_cost(model: ModelConfig, layout: ParallelConfig, tokens: Tokens, is_moe: bool, imbalance: float) -> LayerCost:
    """What a layer costs.

    Args:
        model: sizes.
        layout: parallel sizes.
        tokens: of a micro-batch.
        is_moe: the layer has experts.
        imbalance: tokens of the busiest expert rank beside the mean.
    """
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    hidden, heads = model.hidden_size, model.num_attention_heads
    queries = heads * model.kv_channels / tp
    keys = max(model.num_query_groups / tp, 1.0) * model.kv_channels
    computed, read = tokens.computed, tokens.read
    mlp = _moe_part(model, layout, read, imbalance) if is_moe else _dense_part(model, layout, read)
    # Keys and values of all tokens, queries and output of those that are read.
    of_keys = 2 * hidden * model.num_query_groups * model.kv_channels / tp
    of_queries = attention_weights(model, tp) - of_keys
    share = read / computed
    # The copy in token order and the logsumexp are what a second forward pass of attention makes again.
    recomputed = 2 * read * queries + 4 * read * heads / tp
    kept = (
        4 * hidden * (computed + read) / tp  # inputs and outputs of the two norms
        + 2 * computed * (queries + 2 * keys)  # the product before the norms of queries and keys
        + 2 * read * queries
        + 2 * computed * keys  # queries and keys behind the rotation
        + 2 * read * queries  # the output of attention
        + recomputed
        + (cp - 1) * 4 * computed * keys  # keys and values of the other context ranks, at most
    )
    width = 1.0 if layout.precision != "fp32" else 2.0
    return LayerCost(
        products=2 * (computed * of_keys + read * of_queries) + mlp.products,
        attention=4 * tokens.pairs * share * queries,
        kept=width * (kept + mlp.kept),
        recomputed=width * recomputed,
        kept_by_mlp=width * mlp.kept,
        working=width * (mlp.working + 8 * hidden * computed / tp),
        input=width * 2 * hidden * computed / tp,
        exchanged=width * mlp.exchanged,
        gathered=width * (2 * hidden * (computed + read) * (tp > 1) + mlp.gathered),
        contexts=width * (cp - 1) * 4 * computed * keys,
    )


@dataclass(frozen=True)
class _Part:
    """The MLP or the experts of a layer; see `LayerCost`."""

    products: float
    kept: float
    working: float
    exchanged: float
    gathered: float


def _dense_part(model: ModelConfig, layout: ParallelConfig, read: float) -> _Part:
    tp = layout.tensor_model_parallel_size
    inner = model.ffn_hidden_size / tp
    gathered = 4 * model.hidden_size * read * (tp > 1)
    weights = 3 * model.hidden_size * inner
    return _Part(2 * weights * read, 6 * inner * read, 6 * inner * read + 2 * weights, 0.0, gathered)


def _moe_part(model: ModelConfig, layout: ParallelConfig, read: float, imbalance: float) -> _Part:
    tp, etp = layout.tensor_model_parallel_size, expert_tensor_size(layout)
    hidden, shared = model.hidden_size, model.moe_shared_expert_intermediate_size / tp
    # Each rank sends its tokens to K experts and receives as many; the tensor ranks of an expert all see its tokens.
    sent = model.moe_router_topk * read / tp
    received = sent * etp * imbalance
    inner = model.moe_ffn_hidden_size / etp
    router = model.num_moe_experts * read / tp
    return _Part(
        products=6 * hidden * (inner * received + shared * read) + 2 * hidden * router,
        # Input of the experts, their first product and activation, indices; the router's logits, scores, map in fp32.
        kept=received * (2 * hidden + 6 * inner + 24) + 6 * shared * read + 13 * router,
        # Gradients of the experts' input, output and inner features, and of all their weights before they are summed.
        working=received * (4 * hidden + 6 * inner)
        + 6 * hidden * inner * model.num_moe_experts / layout.expert_model_parallel_size,
        exchanged=4 * hidden * sent * (layout.expert_model_parallel_size > 1),
        gathered=(4 * hidden * read * (tp > 1) if shared else 0.0) + 4 * hidden * received * (etp > 1),
    )

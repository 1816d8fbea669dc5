"""A forward pass without gradients on a layout: bytes that a layer holds while it runs, and seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.planning.layers import LayerCost, Tokens, layer_cost
from megatron_dllm.planning.layout_plan import Setting
from megatron_dllm.planning.parameters import PipelineRank, expert_tensor_size, pipeline_ranks, rank_weights
from megatron_dllm.planning.parts import Parts

# Of the passes over kept bytes that a step makes, a forward pass makes a third.
_MEMORY_PASSES = 8.0 / 3.0
# A step starts three times as many kernels as a forward pass.
_HOST_SHARE = 1.0 / 3.0


@dataclass(frozen=True)
class ForwardTime(Parts):
    """Seconds of a pass, by what takes them; they add up."""

    products: float = 0.0
    attention: float = 0.0
    weights: float = 0.0
    memory: float = 0.0
    experts: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    sends: float = 0.0
    host: float = 0.0
    cache: float = 0.0


def number_width(layout: ParallelConfig) -> int:
    """Bytes of a number, of weights or of activations."""
    return 4 if layout.precision == "fp32" else 2


def _layers(
    model: ModelConfig, layout: ParallelConfig, rank: PipelineRank, tokens: Tokens, imbalance: float
) -> list[tuple[int, LayerCost]]:
    """How many layers of each kind a pipeline rank holds, and what they cost; the last layer is one of them."""
    kinds = ((rank.num_dense, False), (rank.num_moe, True))
    return [(number, layer_cost(model, layout, tokens, is_moe, imbalance)) for number, is_moe in kinds if number]


def forward_bytes(
    model: ModelConfig, layout: ParallelConfig, rank: PipelineRank, tokens: Tokens, imbalance: float
) -> float:
    """Bytes of activations at the most: what attention makes in a layer, or its MLP with the input."""
    costs = [cost for _, cost in _layers(model, layout, rank, tokens, imbalance)]
    one = costs[0]
    # What the experts return: of every token, as many vectors as it has experts.
    returned = model.moe_router_topk * imbalance * one.input if rank.num_moe else 0.0
    mlp = max(cost.kept_by_mlp for cost in costs) + returned + 2 * one.input
    tp, width = layout.tensor_model_parallel_size, number_width(layout)
    heads = model.num_attention_heads / tp + 2 * max(model.num_query_groups / tp, 1.0)
    # Attention arranges queries, keys and values once more for its kernel.
    attention = one.kept - one.kept_by_mlp + width * heads * model.kv_channels * tokens.computed
    return max(attention, mlp)


def forward_time(
    setting: Setting, layout: ParallelConfig, num_gpus: int, tokens: Tokens, num_logits: float
) -> ForwardTime:
    """Seconds in which some tokens pass through all pipeline ranks, one after the other.

    Args:
        setting: model, machine and assumptions.
        layout: of the ranks.
        num_gpus: of all replicas.
        tokens: of a replica, on one context rank.
        num_logits: tokens whose logits are formed.
    """
    parts = [time.parts for time in rank_times(setting, layout, num_gpus, tokens, num_logits)]
    return ForwardTime(**{name: sum(part[name] for part in parts) for name in parts[0]})


def rank_times(
    setting: Setting, layout: ParallelConfig, num_gpus: int, tokens: Tokens, num_logits: float
) -> tuple[ForwardTime, ...]:
    """Seconds of every pipeline rank, with the way of its output to the next one; see `forward_time`."""
    ranks = pipeline_ranks(setting.model, layout)
    distance = num_gpus // layout.pipeline_model_parallel_size
    sent = 2.0 * setting.model.hidden_size * tokens.computed / layout.tensor_model_parallel_size
    seconds = setting.machine.links.send_seconds(sent, distance)
    return tuple(
        replace(_rank_time(setting, layout, rank, tokens, num_logits), sends=0.0 if rank.is_last else seconds)
        for rank in ranks
    )


def _rank_time(
    setting: Setting, layout: ParallelConfig, rank: PipelineRank, tokens: Tokens, num_logits: float
) -> ForwardTime:
    model, machine = setting.model, setting.machine
    imbalance = machine.assumptions.expert_imbalance
    layers = _layers(model, layout, rank, tokens, imbalance)

    def total(of: str) -> float:
        return sum(number * float(getattr(cost, of)) for number, cost in layers)

    tp, cp, etp = layout.tensor_model_parallel_size, layout.context_parallel_size, expert_tensor_size(layout)
    products = total("products") + rank.is_last * 2.0 * model.hidden_size * model.vocab_size / tp * num_logits
    found = ForwardTime(
        products=products / machine.product_rate,
        attention=total("attention") / machine.attention_rate,
        weights=_read_weights(model, layout, rank, tokens) / machine.memory_rate,
        memory=_MEMORY_PASSES * total("kept") / machine.memory_rate,
        experts=machine.links.exchange_seconds(total("exchanged"), layout.expert_model_parallel_size, etp),
        tensor=machine.links.ring_seconds(total("gathered"), max(tp, etp), 1),
        context=machine.links.ring_seconds(total("contexts") * cp / max(cp - 1, 1), cp, tp),
    )
    host = rank.num_layers * machine.assumptions.host_ms_per_layer / 1e3 * _HOST_SHARE
    hidden = found.total if machine.hardware.is_asynchronous else 0.0
    return replace(found, host=max(host - hidden, 0.0))


def _read_weights(model: ModelConfig, layout: ParallelConfig, rank: PipelineRank, tokens: Tokens) -> float:
    """Bytes of weights that a pass reads: of the experts those that some token is sent to."""
    held = rank_weights(model, layout, rank)
    chosen = 1.0
    if model.is_moe:
        # The ranks of a group of experts bring as many tokens each.
        number = tokens.computed * layout.expert_model_parallel_size
        chosen -= (1.0 - model.moe_router_topk / model.num_moe_experts) ** number
    return number_width(layout) * (held.dense + held.experts * chosen)

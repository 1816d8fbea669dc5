"""Time of an optimizer step: what each pipeline rank does in a micro-batch, the bubble, gradients and the optimizer.

A micro-batch takes its products and attention at a share of the rated speed, small operations at the speed of the
GPU's memory, and its exchanges at the speed of the links; but at least as long as the host needs to start the kernels,
and on a CPU that much longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_dllm.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.hardware import HardwareConfig
from megatron_dllm.planning.links import Links
from megatron_dllm.planning.micro_batch import MicroBatch, rank_layers
from megatron_dllm.planning.parameters import (
    PipelineRank,
    Weights,
    expert_tensor_size,
    rank_weights,
    replicas,
    virtual_size,
)
from megatron_dllm.planning.parts import Parts

# Passes of the forward pass's size: forward and backward of products, of attention; of recomputation one more.
_PRODUCT_PASSES, _ATTENTION_PASSES, _EXCHANGE_PASSES, _GATHER_PASSES = 3.0, 3.5, 2.0, 2.5
# How often small operations read or write the kept bytes, and the bytes of a weight that a micro-batch reads and adds.
_MEMORY_PASSES, _WEIGHT_BYTES = 8.0, 14.0
# The head forms its logits twice: 8 operations for each weight and target.
_HEAD_OPERATIONS = 8.0
# What the optimizer reads and writes of a weight of its shard.
_OPTIMIZER_BYTES = 40.0
_GRADIENT_BYTES, _PARAMETER_BYTES = {"fp32": 4.0, "bf16": 2.0}, 2.0


@dataclass(frozen=True)
class StepTime(Parts):
    """Seconds of a step, by what takes them; they add up."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    experts: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    host: float = 0.0
    pipeline: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What executes: rated hardware, links, and the shares of them that a run reaches."""

    hardware: HardwareConfig
    links: Links
    assumptions: AssumptionsConfig = field(repr=False)

    @property
    def product_rate(self) -> float:
        """Operations of matrix products a second."""
        return self.hardware.bf16_tflops * 1e12 * self.assumptions.product_efficiency

    def product_rate_of(self, precision: str) -> float:
        """Operations of the layers' matrix products a second."""
        return self.product_rate * (self.assumptions.fp8_speedup if precision == "fp8" else 1.0)

    @property
    def attention_rate(self) -> float:
        """Operations of attention a second."""
        return self.hardware.bf16_tflops * 1e12 * self.assumptions.attention_efficiency

    @property
    def memory_rate(self) -> float:
        """Bytes of the GPU's memory a second."""
        return self.hardware.memory_gb_per_s * 1e9 * self.assumptions.memory_efficiency


def step_time(
    model: ModelConfig,
    layout: ParallelConfig,
    ranks: tuple[PipelineRank, ...],
    batch: MicroBatch,
    machine: Machine,
    num_gpus: int,
    optimizer: OptimizerConfig,
    weights: dict[PipelineRank, Weights] | None = None,
) -> StepTime:
    """Seconds of an optimizer step.

    Args:
        model: sizes.
        layout: parallel sizes and recomputation.
        ranks: of the pipeline; of those that hold the same layers, one is enough.
        batch: a micro-batch of the stage.
        machine: what executes it.
        num_gpus: of the run.
        optimizer: whether gradients and weights travel while the model computes, and what the host updates.
        weights: of the ranks, where they are known already.
    """
    held = {rank: weights[rank] if weights else rank_weights(model, layout, rank) for rank in ranks}
    times = {rank: micro_batch_time(model, layout, rank, batch, machine, held[rank]) for rank in ranks}
    slowest = max(ranks, key=lambda rank: sum(times[rank].values()))
    one = times[slowest]
    seconds = sum(one.values())
    sends = _sends(layout, batch, machine, num_gpus)
    bubble = (layout.pipeline_model_parallel_size - 1) / virtual_size(layout) * seconds
    gradients = max(_gradients(layout, held[rank], machine, num_gpus, optimizer, seconds) for rank in ranks)
    return StepTime(
        **{name: batch.number * value for name, value in one.items()},
        pipeline=bubble + batch.number * sends,
        gradients=gradients,
        optimizer=max(_optimizer(layout, held[rank], machine, num_gpus, optimizer.offloaded) for rank in ranks),
    )


def micro_batch_time(
    model: ModelConfig,
    layout: ParallelConfig,
    rank: PipelineRank,
    batch: MicroBatch,
    machine: Machine,
    weights: Weights,
) -> dict[str, float]:
    """Seconds of one micro-batch on a pipeline rank, forward and backward, by part."""
    again = float(layout.recompute == "full")
    attended_again = float(layout.recompute != "none")
    method = batch.method
    layers = rank_layers(rank, batch)
    # Of passes without gradients, in which the last layer may compute all tokens.
    before = rank_layers(rank, replace(batch, last=batch.whole) if method.is_whole else batch)
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size

    def total(name: str, passes: float, share: float = 1.0) -> float:
        """Of the step's own passes, and of those without gradients, each with a share of it."""
        own = passes * sum(number * getattr(cost, name) for number, cost in layers)
        if not method.forward_passes:
            return own
        return own + method.forward_passes * share * sum(number * getattr(cost, name) for number, cost in before)

    products = total("products", _PRODUCT_PASSES + again) / machine.product_rate_of(layout.precision)
    if rank.is_last:
        operations = (_HEAD_OPERATIONS + method.head_operations) * model.hidden_size * model.vocab_size / tp
        products += operations * batch.targets / machine.product_rate
    moved = total("kept", 1.0 + again / 3.0, 1.0 / 3.0) * _MEMORY_PASSES + weights.total * _WEIGHT_BYTES
    exchanged, gathered = total("exchanged", _EXCHANGE_PASSES + again), total("gathered", _GATHER_PASSES + again)
    gathered += (2.0 + method.forward_passes) * _gathered_at_ends(model, layout, rank, batch)
    contexts = total("contexts", _EXCHANGE_PASSES + again) * cp / max(cp - 1, 1)
    attention = total("attention", _ATTENTION_PASSES + attended_again, method.attention_share)
    links = machine.links
    etp, ep = expert_tensor_size(layout), layout.expert_model_parallel_size
    parts = {
        "products": products,
        "attention": attention / machine.attention_rate,
        "memory": moved / machine.memory_rate,
        "experts": links.exchange_seconds(exchanged, ep, etp),
        "tensor": links.ring_seconds(gathered, max(tp, etp), 1),
        "context": links.ring_seconds(contexts, cp, tp),
    }
    host = rank.num_layers * machine.assumptions.host_ms_per_layer / 1e3
    host *= 1.0 + (again + method.forward_passes) / 3.0
    hidden = sum(parts.values()) if machine.hardware.is_asynchronous else 0.0
    return {**parts, "host": max(host - hidden, 0.0)}


def _gathered_at_ends(model: ModelConfig, layout: ParallelConfig, rank: PipelineRank, batch: MicroBatch) -> float:
    """Bytes that tensor ranks share in a pass beside those of the layers.

    They scatter the embedding, gather all tokens where the last layer takes its targets from them, and gather those for
    the head.
    """
    if layout.tensor_model_parallel_size == 1:
        return 0.0
    all_tokens = layout.tensor_model_parallel_size * batch.moe.input
    of_targets = 2.0 * model.hidden_size * batch.targets
    is_selected = rank.is_last and batch.last != batch.whole
    return all_tokens * (rank.is_first + is_selected) + of_targets * rank.is_last


def _sends(layout: ParallelConfig, batch: MicroBatch, machine: Machine, num_gpus: int) -> float:
    """Seconds in which a micro-batch's activations and their gradients travel to and from the next pipeline rank."""
    size = layout.pipeline_model_parallel_size
    if size == 1:
        return 0.0
    sent = (2.0 + batch.method.forward_passes) * virtual_size(layout) * batch.moe.input
    return machine.links.send_seconds(sent, num_gpus // size)


def _gradients(
    layout: ParallelConfig,
    weights: Weights,
    machine: Machine,
    num_gpus: int,
    optimizer: OptimizerConfig,
    micro_batch: float,
) -> float:
    """Seconds for which the model waits on gradients that are summed and weights that are gathered.

    Overlapped, gradients travel during the last micro-batch's backward pass, and weights during the first's forward.
    """
    dense, experts = replicas(layout, num_gpus)
    apart = layout.expert_model_parallel_size * expert_tensor_size(layout)
    tp = layout.tensor_model_parallel_size

    def travel(size: float) -> float:
        return machine.links.ring_seconds(weights.dense * size, dense, tp) + machine.links.ring_seconds(
            weights.experts * size, experts, apart
        )

    reduced, gathered = travel(_GRADIENT_BYTES[optimizer.gradients]), travel(_PARAMETER_BYTES)
    if optimizer.overlap_grad_reduce:
        reduced = max(reduced - micro_batch * 2.0 / 3.0, 0.0)
    if optimizer.overlap_param_gather:
        gathered = max(gathered - micro_batch / 3.0, 0.0)
    return reduced + gathered


def _optimizer(layout: ParallelConfig, weights: Weights, machine: Machine, num_gpus: int, offloaded: float) -> float:
    """Seconds of an update, of which the host does a share while the GPU does the rest."""
    dense, experts = replicas(layout, num_gpus)
    shard = weights.dense / dense + weights.experts / experts
    on_gpu = shard * (1.0 - offloaded) * _OPTIMIZER_BYTES / machine.memory_rate
    return max(on_gpu, shard * offloaded * machine.assumptions.offload_ns / 1e9)


def distinct_ranks(ranks: tuple[PipelineRank, ...]) -> tuple[PipelineRank, ...]:
    """One pipeline rank of those that hold the same layers, the first of each."""
    kinds = {(rank.num_dense, rank.num_moe, rank.is_first, rank.is_last): rank for rank in reversed(ranks)}
    return tuple(sorted(kinds.values(), key=lambda rank: rank.index))

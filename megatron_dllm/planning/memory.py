"""Memory of a rank by closed form: model state exactly, activations by what each layer keeps for its backward pass."""

from __future__ import annotations

from megatron_dllm.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_dllm.planning.answer import RankMemory
from megatron_dllm.planning.layers import LayerCost
from megatron_dllm.planning.micro_batch import MicroBatch, rank_layers
from megatron_dllm.planning.parameters import PipelineRank, Weights, rank_weights, replicas, virtual_size

# Elements of the head's logits that exist at a time (`model.head`): in bf16, in fp32, and their gradients.
CHUNK_ELEMENTS = 64 * 1024 * 1024
_CHUNK_BYTES = 10
# The same of a teacher: its logits and probabilities, and their products with the differences of both.
_TEACHER_CHUNK_BYTES = 20
# Of a tensor that the entropy needs.
_ENTROPY_BYTES = 4
# Bytes of each feature of a token while a layer is aligned: fp32 unit vectors of both and what follows from them.
_ALIGNED_BYTES = 20
# Bytes of the gradient of the head's weight.
_HEAD_GRADIENT_BYTES = 2


def model_state(
    weights: Weights, layout: ParallelConfig, num_gpus: int, optimizer: OptimizerConfig | None = None
) -> tuple[int, int, int]:
    """Bytes of weights, of their gradients, and of this rank's shard of the optimizer.

    The optimizer keeps Adam's two moments in fp32 or bf16, and beside bf16 weights an fp32 copy of them; of a share
    that is offloaded nothing lies on the GPU.
    """
    optimizer = optimizer or OptimizerConfig()
    dense, experts = replicas(layout, num_gpus)
    is_bf16 = layout.precision != "fp32"
    kept = (8 if optimizer.moments == "fp32" else 4) + (4 if is_bf16 else 0)
    shard = (weights.dense / dense + weights.experts / experts) * (1.0 - optimizer.offloaded)
    gradients = weights.total * (4 if optimizer.gradients == "fp32" else 2)
    return weights.total * (2 if is_bf16 else 4), gradients, round(shard * kept)


def rank_memory(
    model: ModelConfig,
    layout: ParallelConfig,
    rank: PipelineRank,
    batch: MicroBatch,
    num_gpus: int,
    reserve: int,
    weights: Weights | None = None,
    optimizer: OptimizerConfig | None = None,
    num_models: int = 1,
) -> RankMemory:
    """Bytes of a pipeline rank at the moment of a step at which it holds the most.

    Args:
        model: sizes.
        layout: parallel sizes and recomputation.
        rank: which layers it holds.
        batch: what its layers cost for a micro-batch, and how many it has in a step.
        num_gpus: of the run.
        reserve: bytes beside the tensors.
        weights: of the rank, where they are known already.
        optimizer: how its state is kept, and where; None: the defaults.
        num_models: that lie in memory; of the others than the trained one there are weights alone.
    """
    held = weights or rank_weights(model, layout, rank)
    state = model_state(held, layout, num_gpus, optimizer)
    layers = rank_layers(rank, batch)
    in_flight = pipeline_in_flight(layout, rank.index, batch.number)
    kept = in_flight * sum(number * _kept(layout.recompute, cost) for number, cost in layers)
    kept += _teaching_states(model, layout, rank, batch, in_flight)
    working = _working_set(layout.recompute, layers)
    if batch.method.aligned_share:
        working += _alignment_bytes(layout, batch)
    head = _head_bytes(model, layout, batch) if rank.is_last else 0.0
    # The backward pass of the head comes first, those of the layers later, when the last layer's bytes are free again.
    if rank.is_last:
        working -= min(_kept(layout.recompute, batch.last), kept)
    is_head = head >= working
    return RankMemory(
        # Ranks of megatron-core's order: the pipeline comes last.
        rank=rank.index * (num_gpus // layout.pipeline_model_parallel_size),
        weights=(state[0] + _fp8_copies(model, layout, rank, held)) * num_models,
        gradients=state[1],
        optimizer=state[2],
        activations=round(kept + (0.0 if is_head else working)),
        head=round(head) if is_head else 0,
        reserve=reserve,
    )


def pipeline_in_flight(layout: ParallelConfig, index: int, number: int) -> float:
    """Micro-batches whose activations a pipeline rank holds at once, in layers of the whole rank.

    1F1B: the first of four ranks starts four micro-batches before the first comes back. Interleaved, a rank holds
    pieces of its layers instead (megatron-core's warmup, and one).
    """
    size, pieces = layout.pipeline_model_parallel_size, virtual_size(layout)
    if pieces == 1:
        return min(number, size - index)
    warmup = 2 * (size - index - 1) + (pieces - 1) * size + 1
    return min(number * pieces, warmup) / pieces


def _kept(recompute: str, cost: LayerCost) -> float:
    if recompute == "full":
        return cost.input
    return cost.kept - cost.recomputed if recompute == "selective" else cost.kept


def _working_set(recompute: str, layers: list[tuple[int, LayerCost]]) -> float:
    """What the backward pass of a layer holds for a moment, with the layer itself where it is computed again."""
    again = float(recompute == "full")
    return max((again * cost.kept + cost.working for number, cost in layers if number), default=0.0)


def _head_bytes(model: ModelConfig, layout: ParallelConfig, batch: MicroBatch) -> float:
    """The LM head's backward pass: a chunk of logits, gradients of its weight and of the targets' hidden states.

    A teacher has a chunk of its own beside it.
    """
    rows, targets = model.vocab_size / layout.tensor_model_parallel_size, batch.targets
    more = _TEACHER_CHUNK_BYTES * batch.method.has_teacher + _ENTROPY_BYTES * batch.method.entropy_tensors
    chunk = head_chunk_bytes(model, layout, targets, _CHUNK_BYTES + more)
    return chunk + _HEAD_GRADIENT_BYTES * model.hidden_size * rows + 8 * model.hidden_size * targets


def head_chunk_bytes(model: ModelConfig, layout: ParallelConfig, targets: float, each: float) -> float:
    """Bytes of a chunk of the head's logits.

    Args:
        model: sizes.
        layout: parallel sizes.
        targets: of a micro-batch.
        each: bytes of an element.
    """
    rows = model.vocab_size / layout.tensor_model_parallel_size
    return min(CHUNK_ELEMENTS, targets * rows) * each


def _teaching_states(
    model: ModelConfig, layout: ParallelConfig, rank: PipelineRank, batch: MicroBatch, in_flight: float
) -> float:
    """States that others are compared with: behind the layers, and of the targets.

    Those of a second model lie there for the whole step in a pipeline, else for a micro-batch. The model's own are kept
    as the layers' activations are; where only the upper layers are aligned, each rank is taken to hold as many of them
    as it can.
    """
    method = batch.method
    aligned = min(rank.num_layers, max(1, round(method.aligned_share * model.num_layers)) * (method.aligned_share > 0))
    taught = batch.number if layout.pipeline_model_parallel_size > 1 else 1
    times = taught if method.is_aligned_before else in_flight * (layout.recompute != "full")
    of_targets = 2 * model.hidden_size * batch.targets * (method.has_teacher and rank.is_last)
    return aligned * batch.moe.input * times + of_targets * (taught if method.is_taught_before else 1)


def _alignment_bytes(layout: ParallelConfig, batch: MicroBatch) -> float:
    """What the alignment behind a layer holds for a moment: unit vectors in fp32, or the states of all ranks."""
    width = 2.0 if layout.precision != "fp32" else 4.0
    return _ALIGNED_BYTES / width * batch.moe.input


def _fp8_copies(model: ModelConfig, layout: ParallelConfig, rank: PipelineRank, weights: Weights) -> int:
    """Bytes of the layers' weights in FP8, as they are and transposed, which stand beside those in bf16."""
    if layout.precision != "fp8":
        return 0
    embedding = model.vocab_size * model.hidden_size // layout.tensor_model_parallel_size
    return 2 * max(weights.total - embedding * (rank.is_first + rank.is_last), 0)

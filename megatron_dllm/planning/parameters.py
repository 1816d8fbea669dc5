"""The weights that a pipeline rank holds, by closed form: equal to those that the engine builds, to the last one."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config import ModelConfig, ParallelConfig


@dataclass(frozen=True)
class Weights:
    """Elements that one rank holds.

    Attributes:
        dense: shared by the data and context ranks: everything but the routed experts.
        experts: of the routed experts, shared by fewer ranks.
    """

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.dense + self.experts


@dataclass(frozen=True)
class PipelineRank:
    """Which layers a pipeline rank holds.

    Attributes:
        index: of the rank, from 0.
        num_dense: layers with a dense MLP.
        num_moe: layers with experts.
        is_first: holds the embedding.
        is_last: holds the final norm, the head and the model's last layer.
    """

    index: int
    num_dense: int
    num_moe: int
    is_first: bool
    is_last: bool

    @property
    def num_layers(self) -> int:
        """Of both kinds."""
        return self.num_dense + self.num_moe


def expert_tensor_size(layout: ParallelConfig) -> int:
    """Ranks that share the matrices of an expert."""
    return layout.expert_tensor_parallel_size or layout.tensor_model_parallel_size


def virtual_size(layout: ParallelConfig) -> int:
    """Pieces into which a pipeline rank cuts its layers."""
    return layout.virtual_pipeline_model_parallel_size or 1


def pipeline_ranks(model: ModelConfig, layout: ParallelConfig) -> tuple[PipelineRank, ...]:
    """The layers of every pipeline rank.

    Layers are dealt in order: to the first piece of every rank, then to the second of every rank, and so on. Six layers
    on two ranks in one piece each are 0-2 and 3-5, in three pieces 0, 2, 4 and 1, 3, 5.
    """
    counts = _layer_counts(model.num_layers, layout)
    pieces = virtual_size(layout)
    num_dense = model.num_dense_layers if model.is_moe else model.num_layers
    dense = [0] * len(counts)
    start = 0
    for _ in range(pieces):
        for rank, count in enumerate(counts):
            number = count // pieces
            dense[rank] += max(min(num_dense - start, number), 0)
            start += number
    last = len(counts) - 1
    return tuple(
        PipelineRank(rank, dense[rank], count - dense[rank], rank == 0, rank == last)
        for rank, count in enumerate(counts)
    )


def _layer_counts(num_layers: int, layout: ParallelConfig) -> list[int]:
    size = layout.pipeline_model_parallel_size
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    middle = size - (first is not None) - (last is not None)
    share = (num_layers - (first or 0) - (last or 0)) // middle if middle else 0
    counts = [share] * size
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return counts


def attention_weights(model: ModelConfig, tensor_size: int) -> int:
    """Elements of a layer's attention products on one tensor rank; megatron-core shards them evenly in any case."""
    queries = model.num_attention_heads * model.kv_channels
    keys = model.num_query_groups * model.kv_channels
    return model.hidden_size * (2 * queries + 2 * keys) // tensor_size


def _bias_weights(model: ModelConfig, tensor_size: int) -> int:
    """Elements of the biases of queries, keys and values on one tensor rank."""
    heads = model.num_attention_heads + 2 * model.num_query_groups
    return heads * model.kv_channels // tensor_size if model.add_qkv_bias else 0


def _norm_weights(model: ModelConfig) -> int:
    heads = model.num_attention_heads + model.num_query_groups if model.qk_layernorm_spans_heads else 2
    return 2 * model.hidden_size + (heads * model.kv_channels if model.qk_layernorm else 0)


def rank_weights(model: ModelConfig, layout: ParallelConfig, rank: PipelineRank) -> Weights:
    """Elements that a pipeline rank holds, alike on all its tensor, expert and data ranks."""
    tp = layout.tensor_model_parallel_size
    hidden = model.hidden_size
    dense = rank.num_layers * (attention_weights(model, tp) + _bias_weights(model, tp) + _norm_weights(model))
    dense += rank.num_dense * 3 * hidden * model.ffn_hidden_size // tp
    shared = 3 * hidden * model.moe_shared_expert_intermediate_size // tp
    dense += rank.num_moe * (shared + model.num_moe_experts * hidden)
    of_vocabulary = model.vocab_size * hidden // tp
    # A tied head on another rank than the embedding is a copy of it.
    is_copied = rank.is_last and not (model.tie_word_embeddings and rank.is_first)
    dense += (rank.is_first + is_copied) * of_vocabulary + rank.is_last * hidden
    experts = rank.num_moe * model.num_moe_experts // layout.expert_model_parallel_size
    return Weights(dense, experts * 3 * hidden * model.moe_ffn_hidden_size // expert_tensor_size(layout))


def replicas(layout: ParallelConfig, num_gpus: int) -> tuple[int, int]:
    """Ranks that hold the same dense weights (data and context ranks), and those that hold the same experts."""
    pp = layout.pipeline_model_parallel_size
    dense = num_gpus // (layout.tensor_model_parallel_size * pp)
    experts = num_gpus // (layout.expert_model_parallel_size * expert_tensor_size(layout) * pp)
    return dense, experts

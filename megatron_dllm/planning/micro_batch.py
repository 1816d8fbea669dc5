"""One micro-batch of a stage on a layout: how many of them a step has, and what each kind of layer costs for it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config import ModelConfig, ParallelConfig, StageConfig, TrainingConfig
from megatron_dllm.planning.layers import LayerCost, Tokens, layer_cost
from megatron_dllm.planning.methods import MethodCost, method_cost
from megatron_dllm.planning.parameters import PipelineRank
from megatron_dllm.planning.rows import RowContent


@dataclass(frozen=True)
class MicroBatch:
    """Of a stage, on one rank.

    Attributes:
        number: micro-batches of a step.
        rows: of each of them, shared by the context ranks.
        targets: tokens with a loss, on one context rank.
        dense: cost of a layer with a dense MLP.
        moe: of a layer with experts; in a dense model the same.
        last: of the model's last layer, whose output is read for targets alone.
        is_last_moe: the last layer has experts.
        method: what the stage does beside a forward and a backward pass.
    """

    number: int
    rows: int
    targets: float
    dense: LayerCost
    moe: LayerCost
    last: LayerCost
    is_last_moe: bool
    method: MethodCost

    @property
    def whole(self) -> LayerCost:
        """Of the model's last layer, where its output of all tokens is read."""
        return self.moe if self.is_last_moe else self.dense


def micro_batch_of(
    model: ModelConfig,
    layout: ParallelConfig,
    stage: StageConfig,
    row: RowContent,
    num_gpus: int,
    imbalance: float,
    training: TrainingConfig,
    rows: int | None = None,
    num_models: int = 1,
) -> MicroBatch:
    """A micro-batch of a stage.

    Args:
        model: sizes.
        layout: parallel sizes.
        stage: for its batch, and whether it reads the last layer's output of all tokens.
        row: what a row of the stage holds.
        num_gpus: of the run.
        imbalance: tokens of the busiest expert rank beside the mean.
        training: whether the last layer leaves out tokens.
        rows: of a micro-batch; None: the stage's.
        num_models: that lie in memory.
    """
    size = rows or stage.micro_batch_size
    cp = layout.context_parallel_size
    computed, targets, pairs = (size * count / cp for count in (row.length, row.targets, row.pairs))
    full = Tokens(computed, computed, pairs)
    skips = skips_outputs(layout, training) and not stage.reads_all_outputs
    last = Tokens(computed, min(targets, computed), pairs) if skips else full
    dense = layer_cost(model, layout, full, False, imbalance)
    moe = layer_cost(model, layout, full, True, imbalance) if model.is_moe else dense
    number = stage.global_batch_size // (layout.data_parallel_size(num_gpus) * size)
    is_last_moe = model.is_moe
    of_last = layer_cost(model, layout, last, is_last_moe, imbalance)
    return MicroBatch(number, size, targets, dense, moe, of_last, is_last_moe, method_cost(stage, num_models))


def skips_outputs(layout: ParallelConfig, training: TrainingConfig) -> bool:
    """Whether the last layer computes only what is read (`model.last_layer`), on a GPU."""
    is_balanced = bool(training.moe_router_bias_update_rate or training.moe_aux_loss_coeff or training.moe_z_loss_coeff)
    exchanges_heads = layout.context_parallel_size > 1 and layout.context_parallel_method == "ulysses"
    is_flex = layout.moe_token_dispatcher == "flex"
    is_possible = not is_balanced and not exchanges_heads and not is_flex and layout.precision != "fp8"
    return training.skip_unused_outputs and is_possible


def rank_layers(rank: PipelineRank, batch: MicroBatch) -> list[tuple[int, LayerCost]]:
    """How many layers of each kind a pipeline rank holds, and what they cost."""
    num_dense, num_moe = rank.num_dense, rank.num_moe
    if not rank.is_last:
        return [(num_dense, batch.dense), (num_moe, batch.moe)]
    if batch.is_last_moe:
        num_moe -= 1
    else:
        num_dense -= 1
    return [(num_dense, batch.dense), (num_moe, batch.moe), (1, batch.last)]

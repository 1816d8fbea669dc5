"""A schedule fitted to a model and a budget: what a recipe says once for all of its stages is put into each of them."""

from __future__ import annotations

from dataclasses import replace

from megatron_dllm.config.schedule import ScheduleConfig, StageConfig


def fitted(schedule: ScheduleConfig, max_position_embeddings: int) -> ScheduleConfig:
    """The schedule with `is_fitted_to_model` and the values for all stages carried out; doing it again changes nothing.

    Args:
        schedule: as the recipes give it.
        max_position_embeddings: of the model.
    """
    if schedule.is_fitted_to_model:
        schedule = _shortened(schedule, max_position_embeddings)
    stages = {name: _with_common_values(stage, schedule) for name, stage in schedule.stages.items()}
    if schedule.num_tokens is not None:
        stages = _scaled(stages, schedule.num_tokens)
    return replace(schedule, stages=stages)


def _shortened(schedule: ScheduleConfig, longest: int) -> ScheduleConfig:
    """At most `longest` tokens a segment, a power of two where that is less than what the recipe asks for.

    Example, 4096 -> 512: blocks 1, 4, 32, 64, 4096, 2048, 1024, 512, 128, 32 become 1, 4, 32, 64, 512, 128, 32. The
    stage of whole segments stays one; of the others those remain whose blocks are still shorter than a segment.
    """
    if not 0 < longest < schedule.context_length:
        return schedule
    context_length = 1 << (longest.bit_length() - 1)
    row_length = schedule.row_length
    stages = {
        name: replace(stage, block_size=context_length) if stage.block_size == schedule.context_length else stage
        for name, stage in schedule.stages.items()
        if stage.block_size < context_length or stage.block_size == schedule.context_length
    }
    if row_length is not None:
        row_length = row_length * context_length // schedule.context_length
    return replace(schedule, context_length=context_length, row_length=row_length, stages=stages)


def _with_common_values(stage: StageConfig, schedule: ScheduleConfig) -> StageConfig:
    common = {name: getattr(schedule, name) for name in ("learning_rate", "global_batch_size", "micro_batch_size")}
    return replace(stage, **{name: value for name, value in common.items() if value is not None})


def _scaled(stages: dict[str, StageConfig], num_tokens: int) -> dict[str, StageConfig]:
    """The stages with `num_tokens` in all, each its share; the warmup of a learning rate shrinks or grows with it."""
    sizes = {name: _tokens_of(name, stage, num_tokens) for name, stage in stages.items()}
    total = sum(sizes.values())
    scaled, before, end = {}, 0, 0
    for name, stage in stages.items():
        end += sizes[name]
        tokens = end * num_tokens // total - before * num_tokens // total
        before = end
        warmup = stage.lr_warmup_tokens * tokens // sizes[name]
        scaled[name] = replace(stage, num_tokens=tokens, lr_warmup_tokens=warmup)
    return scaled


def _tokens_of(name: str, stage: StageConfig, num_tokens: int) -> int:
    if stage.num_tokens is None:
        raise ValueError(
            f"schedule.num_tokens ({num_tokens}) is shared out among stages that give their tokens, and stage {name} "
            f"gives num_epochs ({stage.num_epochs}); change schedule.stages.{name}.num_epochs instead."
        )
    return stage.num_tokens

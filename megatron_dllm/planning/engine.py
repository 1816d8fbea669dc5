"""The engine's own answer: the product builds the model and runs a step as any rank of any layout, in this process.

1 groups   of that rank, whose collectives go nowhere
2 build    model, wrapper and optimizer, with weights that have shapes alone: parameters and model state
3 step     some micro-batches of the stage through the product's schedule: peak memory, work and traffic
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_dllm.config import ParallelConfig, StageConfig, TrainConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.data.context_shard import take_context_shard
from megatron_dllm.model.attention.backends import BACKENDS, Backend
from megatron_dllm.model.objective import objective_of
from megatron_dllm.model.paths import Paths, choose_paths
from megatron_dllm.parallel.device import DeviceFacts
from megatron_dllm.parallel.fake_world import fake_world
from megatron_dllm.parallel.groups import Groups, group_labels
from megatron_dllm.parallel.optimizer_parts import optimizer_parts
from megatron_dllm.planning.answer import ENGINE, RankAnswer, RankMemory, StageAnswer
from megatron_dllm.planning.engine_kernels import ShapedFlex
from megatron_dllm.planning.engine_ledger import Ledger
from megatron_dllm.planning.engine_memory import LiveMemory
from megatron_dllm.planning.engine_rows import micro_batches
from megatron_dllm.planning.engine_values import DeviceNames, KnownValues
from megatron_dllm.training.engine import Engine, build_chunks, build_engine
from megatron_dllm.training.frozen import FrozenModel
from megatron_dllm.training.loop import embedding_noise
from megatron_dllm.training.step import train_step
from megatron_dllm.training.teaching import teach

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ModelState:
    """Bytes of one rank that stay from step to step.

    Attributes:
        num_parameters: elements of the weights.
        weights: in the training precision.
        gradients: of the buffer in which they are summed.
        optimizer: fp32 weights and moments.
    """

    num_parameters: int
    weights: int
    gradients: int
    optimizer: int


def measure(
    config: TrainConfig,
    layout: ParallelConfig,
    world_size: int,
    rank: int,
    stage: str,
    facts: DeviceFacts | None = None,
) -> StageAnswer:
    """What one rank holds and does in a step of a stage, as the engine itself says.

    Args:
        config: of the run.
        layout: of the stage.
        world_size: number of ranks.
        rank: which of them.
        stage: its name in the schedule.
        facts: of the device; None: a GPU without TransformerEngine.

    Raises:
        ValueError: the layout does not suit the model or the number of ranks.
    """
    _check(config, layout, world_size, rank)
    chosen = stage_of(config, stage)
    offloaded = config.optimizer.offloaded
    # A host's memory is none of the tensors that are watched: what lies there is taken off afterwards.
    config = replace(config, parallel=layout, optimizer=replace(config.optimizer, offload="none"))
    # A batch smaller than the ranks is the caller's to refuse; here it runs once.
    total = max(1, chosen.global_batch_size // (chosen.micro_batch_size * layout.data_parallel_size(world_size)))
    number = min(total, _enough(layout))
    batches = micro_batches(config, chosen, number)
    paths = _paths(config, facts)
    with fake_world(layout, rank, world_size) as groups:
        answer = _run(config, chosen, groups, paths, batches, total / number)
    kept = round(answer.memory.optimizer * (1.0 - offloaded))
    answer = replace(answer, memory=replace(answer.memory, optimizer=kept))
    return StageAnswer(stage, (answer,), ENGINE)


def stage_of(config: TrainConfig, name: str) -> StageConfig:
    """The stage of that name.

    Raises:
        ValueError: the schedule has none.
    """
    stages = config.schedule.stages
    if name not in stages:
        raise ValueError(f"stage ({name}) must be one of {', '.join(stages)}, those of the schedule.")
    return stages[name]


def num_parameters(config: TrainConfig, layout: ParallelConfig, world_size: int, rank: int) -> int:
    """Elements of the weights that one rank holds, by building its part of the model.

    Args:
        config: of the run.
        layout: of the stage.
        world_size: number of ranks.
        rank: which of them.

    Raises:
        ValueError: the layout does not suit the model or the number of ranks.
    """
    _check(config, layout, world_size, rank)
    config = replace(config, parallel=layout)
    paths, memory = _paths(config, None), LiveMemory()
    with fake_world(layout, rank, world_size) as groups, DeviceNames(True, memory), KnownValues(Ledger({}), 1.0):
        chunks = build_chunks(config, groups, is_training=True, paths=paths)
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


def distinct_ranks(layout: ParallelConfig, world_size: int) -> tuple[int, ...]:
    """One rank of each kind: of the first pipeline stage, the second (which holds most of those between), the last."""
    stages = layout.pipeline_model_parallel_size
    step = world_size // stages
    return tuple(dict.fromkeys(stage * step for stage in (0, min(1, stages - 1), stages - 1)))


def _check(config: TrainConfig, layout: ParallelConfig, world_size: int, rank: int) -> None:
    layout.validate(world_size, config.model)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank ({rank}) must lie in [0, {world_size}), the ranks of the run; choose one of them.")


def _paths(config: TrainConfig, facts: DeviceFacts | None) -> Paths:
    facts = facts or DeviceFacts.as_cuda(has_transformer_engine=False)
    backend = config.training.attention_backend
    return choose_paths(config.model, config.parallel, facts, backend, True, config.optimizer)


def _enough(layout: ParallelConfig) -> int:
    """Micro-batches after which a pipeline holds as many as it ever does."""
    stages = layout.pipeline_model_parallel_size
    return stages + 1 if layout.virtual_pipeline_model_parallel_size is None else 2 * stages


def _run(
    config: TrainConfig, stage: StageConfig, groups: Groups, paths: Paths, batches: Sequence[Batch], scale: float
) -> RankAnswer:
    ledger, memory = Ledger(group_labels()), LiveMemory()
    share = config.model.moe_router_topk / config.model.num_moe_experts if config.model.is_moe else 1.0
    known = KnownValues(ledger, share, roles_of_ranks(batches, groups))
    with DeviceNames(paths.collectives.name == "nccl", memory), known, memory:
        # A backend is known by what it can do; mypy wants a module's attribute to be writable.
        backends: dict[str, Any] = {**BACKENDS, "flex": ShapedFlex(ledger)}
        engine = build_engine(config, groups, paths, backends)
        state = _model_state(engine, memory)
        second = _second_model(config, groups, paths, backends)
        ledger.clear()
        memory.start_peak()
        objective = objective_of(stage, config.noise)
        before = memory.live
        taught = teach(second, batches, objective)
        states = memory.live - before
        train_step(engine, batches, CPU, objective, embedding_noise(config, 0), taught=taught)
    weights = state.weights * (1 if second is None else 2)
    kept = weights + state.gradients + state.optimizer
    found = RankMemory(
        rank=groups.world.rank(),
        weights=weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        # In a pipeline a teacher's states lie there for all micro-batches of a step, also those that are not run here.
        activations=memory.peak - memory.peak_head - kept + round(states * (scale - 1.0)),
        head=memory.peak_head,
    )
    return RankAnswer(found, state.num_parameters, round(ledger.flops * scale), ledger.traffic(scale))


def _second_model(
    config: TrainConfig, groups: Groups, paths: Paths, backends: Mapping[str, Backend]
) -> FrozenModel | None:
    """The frozen model that the run has beside the trained one, if any."""
    if not config.has_second_model:
        return None
    return FrozenModel(build_chunks(config, groups, True, paths, backends), CPU, groups)


def _model_state(engine: Engine, memory: LiveMemory) -> ModelState:
    """Make the optimizer's state by an update without gradients, and add up what is there."""
    parameters = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    buffers = [buffer for chunk in engine.chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    before = memory.live
    optimizer = _main_bytes(engine)
    engine.optimizer.prepare_grads()
    engine.optimizer.step_with_ready_grads()
    return ModelState(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        weights=sum(parameter.nbytes for parameter in parameters),
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=optimizer + memory.live - before,
    )


def _main_bytes(engine: Engine) -> int:
    """Bytes of the fp32 weights that the optimizer keeps beside those of the model."""
    found: list[Tensor] = []
    for part in optimizer_parts(engine.optimizer):
        for group in getattr(part, "shard_fp32_from_float16_groups", []):
            found += group
    return sum(tensor.nbytes for tensor in found if tensor is not None)


def roles_of_ranks(batches: Sequence[Batch], groups: Groups) -> list[list[Tensor]]:
    """For each micro-batch what every context rank brings to the exchange of roles, [s/cp, b, 3] int32.

    Args:
        batches: of whole rows.
        groups: of one of these ranks.
    """
    size = groups.context.size()
    if size == 1:
        return []
    return [
        [take_context_shard(batch, rank, size).roles.transpose(0, 1).contiguous() for rank in range(size)]
        for batch in batches
    ]

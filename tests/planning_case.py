"""A small model whose activations outweigh its weights, and what a real step of it holds: the planner's other side."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_dllm.config import ParallelConfig, RunConfig, ScheduleConfig, SftConfig, StageConfig, TrainConfig
from tests.tiny_models import LING

MODEL = replace(
    LING,
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    kv_channels=16,
    vocab_size=1024,
    moe_ffn_hidden_size=32,
    moe_shared_expert_intermediate_size=32,
    num_moe_experts=16,
    moe_router_topk=4,
    moe_router_num_groups=0,
    moe_router_group_topk=0,
    max_position_embeddings=4096,
)
_STAGE = StageConfig(
    objective="block_diffusion", block_size=32, num_tokens=10**6, global_batch_size=4, learning_rate=1e-3
)
STAGES = {
    "ar": replace(_STAGE, objective="ar", block_size=1),
    "block": _STAGE,
    "views": replace(_STAGE, num_views=2),
    "mdlm": replace(_STAGE, block_size=256),
    "sft": replace(_STAGE, sft=SftConfig()),
}
_TENSOR = dict(tensor_model_parallel_size=2, sequence_parallel=True)
LAYOUTS = {
    "one": ParallelConfig(),
    "pipeline": ParallelConfig(pipeline_model_parallel_size=2),
    "tensor": ParallelConfig(**_TENSOR),
    "context": ParallelConfig(context_parallel_size=2),
    "expert": ParallelConfig(expert_model_parallel_size=2),
    "tensor_expert": ParallelConfig(**_TENSOR, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
}


def config() -> TrainConfig:
    """Of all stages."""
    return TrainConfig(model=MODEL, schedule=ScheduleConfig(context_length=256, row_length=768, stages=dict(STAGES)))


@dataclass(frozen=True)
class Held:
    """Bytes of a real rank: what stays from step to step by kind, the peak of a step, and what it leaves behind."""

    weights: int
    gradients: int
    optimizer: int
    peak: int
    left: int

    @property
    def activations(self) -> int:
        """What the peak holds beside the state."""
        return self.peak - self.weights - self.gradients - self.optimizer


@dataclass(frozen=True)
class Case:
    """What a layout is asked to do.

    Attributes:
        stage: its name in STAGES.
        recompute: of the layout.
    """

    stage: str
    recompute: str


def hold_all(layout: ParallelConfig, cases: Sequence[Case], number: int) -> list[Held]:
    """`hold` of all cases, one after the other."""
    from megatron.core import parallel_state

    found = []
    for case in cases:
        found.append(hold(replace(layout, recompute=case.recompute), case.stage, number))
        parallel_state.destroy_model_parallel()
        gc.collect()  # what the engine holds in cycles
    return found


def hold(layout: ParallelConfig, stage: str, number: int) -> Held:
    """Train some steps as a rank of a real group, and watch those after the first.

    gloo's threads let go of what they have sent some time after a step has gone on, on a busy machine later: a peak may
    hold a buffer more than the step does (393,216 bytes once, of 24 million). The least peak of three steps counts.
    """
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.model.objective import objective_of
    from megatron_dllm.parallel.groups import initialize
    from megatron_dllm.planning.engine_memory import LiveMemory
    from megatron_dllm.planning.engine_rows import micro_batches
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.loop import embedding_noise
    from megatron_dllm.training.step import train_step

    run = replace(config(), parallel=layout)
    chosen = run.schedule.stages[stage]
    batches = micro_batches(run, chosen, number)
    groups, memory = initialize(layout, RunConfig(name="held")), LiveMemory()
    arguments = (torch.device("cpu"), objective_of(chosen, run.noise), embedding_noise(run, 0))
    with memory:
        engine = build_engine(run, groups)
        _choose_evenly(engine.chunks)
        train_step(engine, batches, *arguments)
        peaks = []
        for _ in range(3):
            before = memory.live
            memory.start_peak()
            train_step(engine, batches, *arguments)
            peaks.append(memory.peak)
    weights = sum(parameter.nbytes for chunk in engine.chunks for parameter in chunk.parameters())
    buffers = [buffer for chunk in engine.chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    states = [part.optimizer.state.values() for part in _parts(engine.optimizer)]
    main = [group for part in _parts(engine.optimizer) for group in part.shard_fp32_from_float16_groups]
    return Held(
        weights=weights,
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=sum(tensor.nbytes for state in states for one in state for tensor in one.values())
        + sum(tensor.nbytes for group in main for tensor in group),
        peak=min(peaks),
        left=memory.live - before,
    )


def _choose_evenly(chunks: list[torch.nn.Module]) -> None:
    """Have every token choose the same experts, of each half as many, so that two expert ranks get as many tokens."""
    half = MODEL.num_moe_experts // 2
    chosen = [first + place for first in (0, half) for place in range(MODEL.moe_router_topk // 2)]
    biases = [bias for chunk in chunks for name, bias in chunk.named_buffers() if name.endswith("expert_bias")]
    assert biases, "a router without a bias chooses by itself"
    for bias in biases:
        bias[chosen] = 10.0  # scores lie between 0 and 1


def _parts(optimizer: object) -> list[object]:
    return getattr(optimizer, "chained_optimizers", [optimizer])

"""The process groups of a layout, made once and handed on; the random seeds that depend on them.

This package is the only reader of megatron-core's `parallel_state`: everything else gets a `Groups`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from megatron_dllm.config import ParallelConfig, RunConfig
from megatron_dllm.host import prepare_host
from megatron_dllm.parallel.device import choose_determinism
from megatron_dllm.parallel.meeting import Meeting, meet
from megatron_dllm.run.place import read_place


@dataclass(frozen=True)
class Groups:
    """The process groups this rank belongs to; a group knows its `rank()` and `size()`.

    Attributes:
        world: every rank of the run.
        tensor: ranks that split each weight and, with sequence parallelism, the tokens between layers.
        pipeline: ranks that hold successive layers.
        context: ranks that hold parts of the same rows.
        data: ranks that read different rows, one of them for each place in the other groups.
        data_context: ranks that hold the same weights, so `data` times `context`.
        expert: ranks that hold different experts.
        virtual_size: model chunks on each pipeline rank; None without virtual pipeline stages.
    """

    world: ProcessGroup
    tensor: ProcessGroup
    pipeline: ProcessGroup
    context: ProcessGroup
    data: ProcessGroup
    data_context: ProcessGroup
    expert: ProcessGroup
    virtual_size: int | None = None

    @classmethod
    def current(cls) -> Groups:
        """The groups that megatron-core was initialised with (`initialize`)."""
        world = torch.distributed.group.WORLD
        assert world is not None, "the process group of all ranks has not been started"
        return cls(
            world=world,
            tensor=parallel_state.get_tensor_model_parallel_group(),
            pipeline=parallel_state.get_pipeline_model_parallel_group(),
            context=parallel_state.get_context_parallel_group(),
            data=parallel_state.get_data_parallel_group(),
            data_context=parallel_state.get_data_parallel_group(with_context_parallel=True),
            expert=parallel_state.get_expert_model_parallel_group(),
            virtual_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        )

    def is_first_stage(self, vp_stage: int | None = None) -> bool:
        """Whether this rank (with virtual stages: its chunk `vp_stage`) holds the embedding."""
        return self.pipeline.rank() == 0 and not vp_stage

    def is_last_stage(self, vp_stage: int | None = None) -> bool:
        """Whether this rank (with virtual stages: its chunk `vp_stage`) holds the head."""
        is_last_rank = self.pipeline.rank() == self.pipeline.size() - 1
        return is_last_rank and (self.virtual_size is None or vp_stage == self.virtual_size - 1)


def start_process_group(run: RunConfig, meeting: Meeting | None = None) -> None:
    """Start the process group of all ranks, unless it has been started.

    Args:
        run: backend and timeout.
        meeting: where the ranks have met; None: they meet now.
    """
    prepare_host()
    backend = run.distributed_backend
    if backend == "auto":
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_gpu())
    timeout = timedelta(minutes=run.distributed_timeout_minutes)
    if not torch.distributed.is_initialized():
        meeting = meeting or meet(run)
        torch.distributed.init_process_group(
            backend,
            store=torch.distributed.PrefixStore("default_pg", meeting.store),  # type: ignore[attr-defined]
            rank=meeting.rank,
            world_size=meeting.world_size,
            timeout=timeout,
        )


def _local_gpu() -> int:
    """The GPU of this rank: that of its number on the machine.

    Raises:
        ValueError: there are fewer.
    """
    local_rank, count = read_place().local_rank, torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK ({local_rank}) must be below the number of GPUs that this process sees ({count}); start at "
            "most one rank a GPU."
        )
    return local_rank


def initialize(parallel: ParallelConfig, run: RunConfig, meeting: Meeting | None = None) -> Groups:
    """Start the process group, megatron-core's groups for this layout, and the random seeds.

    Weights initialised afterwards differ between layouts: a comparison starts from a checkpoint.

    Args:
        parallel: sizes of the layout, already validated.
        run: backend, timeout and seed.
        meeting: where the ranks have met; None: they meet now.

    Returns:
        The groups.
    """
    choose_determinism(run.is_deterministic)
    start_process_group(run, meeting)
    split_ranks(parallel, run.distributed_timeout_minutes)
    seed_everything(run.seed)
    return Groups.current()


def split_ranks(parallel: ParallelConfig, timeout_minutes: float) -> None:
    """Make megatron-core's groups of a layout.

    Without its second set, of gloo for tensors on the host, which nothing here uses: each of those joins every rank of
    a group with every other, so that the number of connections grows with the square of the ranks.

    Args:
        parallel: sizes of the layout, already validated.
        timeout_minutes: after which a collective of these groups fails.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )


def group_labels() -> dict[str, str]:
    """By the name that torch gave it, what each group of this rank is for: tp, pp, cp, ep, etp, tp_ep, dp or edp."""
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "etp": parallel_state.get_expert_tensor_parallel_group(),
        "tp_ep": parallel_state.get_expert_tensor_and_model_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "edp": parallel_state.get_expert_data_parallel_group(),
    }
    return {group.group_name: label for label, group in groups.items()}


@contextmanager
def started(parallel: ParallelConfig, run: RunConfig, meeting: Meeting | None = None) -> Iterator[Groups]:
    """Process groups of a layout while the block runs, unless the caller has started groups already; those stay.

    Args:
        parallel: sizes of the layout, already validated.
        run: backend, timeout and seed.
        meeting: where the ranks have met; None: they meet now.
    """
    if parallel_state.model_parallel_is_initialized():
        yield Groups.current()
        return
    groups = initialize(parallel, run, meeting)
    try:
        yield groups
    finally:
        destroy()


@contextmanager
def single_rank(seed: int) -> Iterator[Groups]:
    """Process groups of one rank, unless the caller has started groups already; those stay."""
    with started(ParallelConfig(), RunConfig(name="single", seed=seed)) as groups:
        yield groups


def seed_everything(seed: int) -> None:
    """Seed torch on this rank, and the states that megatron-core keeps per tensor, expert and pipeline rank.

    Layers of different pipeline stages start from different numbers; the ranks of a data-parallel group from
    the same.
    """
    stage_seed = (seed + 100 * parallel_state.get_pipeline_model_parallel_rank()) % 2**31
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def destroy() -> None:
    """Take down megatron-core's groups and the process group, if they exist."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

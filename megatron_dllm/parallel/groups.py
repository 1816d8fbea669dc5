"""Process groups and random seeds of a run and this rank's place in them."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_dllm.config import ParallelConfig, RunConfig
from megatron_dllm.host import prepare_host


def world_size() -> int:
    """Number of ranks as the launcher says it (torchrun's WORLD_SIZE); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank_zero() -> bool:
    """Whether this process is the first of the run: the one that logs and writes shared files."""
    return int(os.environ.get("RANK", "0")) == 0


def start_process_group(run: RunConfig) -> None:
    """Start the process group of all ranks, unless it has been started.

    Ranks, addresses and ports come from the launcher's environment variables; without a launcher the run is
    one rank.
    """
    prepare_host()
    backend = run.distributed_backend
    if backend == "auto":
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(minutes=run.distributed_timeout_minutes)
    if not torch.distributed.is_initialized():
        if "RANK" in os.environ:
            torch.distributed.init_process_group(backend, timeout=timeout)
        else:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def initialize(parallel: ParallelConfig, run: RunConfig) -> None:
    """Start the process group, megatron-core's groups for this layout, and the random seeds.

    Weights initialised afterwards differ between layouts: a comparison starts from a checkpoint.

    Args:
        parallel: sizes of the layout, already validated.
        run: backend, timeout and seed.
    """
    start_process_group(run)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=run.distributed_timeout_minutes,
    )
    seed_everything(run.seed)


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

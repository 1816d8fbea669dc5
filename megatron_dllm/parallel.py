"""Process groups and random seeds of a run, this rank's place in them, and its share of a row's tokens."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megatron_dllm.config import ParallelConfig, RunConfig
from megatron_dllm.diffusion.context_deal import deal_row
from megatron_dllm.host import prepare_host

# A data.batch.Batch: the data layer stands above this one.
AnyBatch = TypeVar("AnyBatch", bound=Any)


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
        distributed_timeout_minutes=run.distributed_timeout_minutes)
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


def deal_context(batch: AnyBatch, cp_size: int) -> Tensor:
    """Which tokens of each row each context-parallel rank holds, from roles and targets alone.

    Args:
        batch: whole rows, on the CPU.
        cp_size: context-parallel ranks.

    Returns:
        [b, cp_size, s / cp_size] int64 indexes into the row.
    """
    is_target = np.zeros(batch.input_ids.shape, dtype=np.bool_)
    is_target.reshape(-1)[batch.target_positions.numpy()] = True
    rows = zip(batch.roles.numpy(), is_target, strict=True)
    return torch.from_numpy(np.stack([deal_row(roles, targets, cp_size) for roles, targets in rows]))


def take_context_shard(batch: AnyBatch, cp_rank: int, cp_size: int) -> AnyBatch:
    """This context-parallel rank's tokens of the micro-batch.

    Tensors per token become [b, s / cp_size]; targets are those of these tokens, with positions that count in
    the shard. Row keys, sample ids and the counts (num_maskable, ...) stay those of the whole rows: they must
    not be summed over context-parallel ranks.

    Args:
        batch: whole rows, on the CPU; the same on every rank of the group.
        cp_rank: this rank's place in the group.
        cp_size: size of the group; 1 returns the batch itself.
    """
    if cp_size == 1:
        return batch
    tokens = deal_context(batch, cp_size)[:, cp_rank]
    num_rows, length = batch.input_ids.shape
    per_token = {name: getattr(batch, name).gather(1, tokens) for name in ("input_ids", "position_ids", "is_masked")}
    flat = (tokens + torch.arange(num_rows).unsqueeze(-1) * length).reshape(-1)
    place = torch.full((num_rows * length,), -1, dtype=torch.int64)
    place[flat] = torch.arange(len(flat))
    local = place[batch.target_positions]
    mine = local >= 0
    per_target = {name: getattr(batch, name)[mine] for name in ("target_ids", "loss_weights", "target_t")}
    return replace(batch, roles=batch.roles.flatten(0, 1)[flat].view(num_rows, -1, 3), target_positions=local[mine],
                   **per_token, **per_target)

"""One global batch through megatron-core's pipeline schedule: forward, and backward where a step trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_dllm.data.batch import Batch
from megatron_dllm.data.context_shard import take_context_shard
from megatron_dllm.diffusion.losses.nll import bucket_sums, weighted_nll
from megatron_dllm.diffusion.losses.outputs import TargetOutputs

# Layout of the vector of sums that one forward pass contributes: the weighted loss, the unweighted
# NLL, the correct predictions, the targets, the denominator; then (nll, count, correct) per t bucket.
LOSS, NLL, CORRECT, TARGETS, MASKABLE, BUCKETS = 0, 1, 2, 3, 4, 5
NUM_BUCKETS = 10
NUM_SUMS = BUCKETS + 3 * NUM_BUCKETS


@dataclass(frozen=True)
class EmbeddingNoise:
    """Noise on masked embeddings in one step: relative standard deviation and the key of its draws."""

    sigma: float = 0.0
    seed: int = 0


def _loss(batch: Batch, output: TargetOutputs) -> tuple[Tensor, Tensor, Tensor]:
    """(loss sum, denominator, sums): megatron divides the gradient once, by the global denominator.

    Under context parallelism the denominator is counted by the first rank alone, since every rank
    of the group holds a part of the same rows.
    """
    nll, is_correct = output.nll, output.is_correct
    loss = weighted_nll(nll, batch.loss_weights)
    owner = 1 if parallel_state.get_context_parallel_rank() == 0 else 0
    maskable = batch.num_maskable * owner
    detached = nll.detach()
    head = torch.stack(
        [
            loss.detach().float(),
            detached.sum().float(),
            is_correct.sum().float(),
            detached.new_full((), nll.numel()).float(),
            maskable.float(),
        ]
    )
    sums = torch.cat([head.double(), bucket_sums(detached, is_correct, batch.target_t, NUM_BUCKETS).flatten()])
    return loss, maskable.int(), sums


def _forward_step(
    noise: EmbeddingNoise, observe: Callable[[Batch], None] | None, batches: Iterator[Batch], model: nn.Module
) -> tuple[Any, Callable[..., Any]]:
    batch = next(batches)
    if observe is not None:
        observe(batch)
    output = model(batch, mask_noise_sigma=noise.sigma, noise_seed=noise.seed)
    return output, partial(_loss, batch)


def _local_batches(micro_batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    rank = parallel_state.get_context_parallel_rank()
    size = parallel_state.get_context_parallel_world_size()
    shards = [take_context_shard(batch, rank, size) for batch in micro_batches]
    if size > 1 and device.type == "cuda":
        # The loader's batches are page-locked, a shard is not: its copy would wait for the device.
        shards = [shard.pin_memory() for shard in shards]
    return [shard.to(device) for shard in shards]


def run_schedule(
    chunks: list[nn.Module],
    micro_batches: Sequence[Batch],
    device: torch.device,
    *,
    forward_only: bool,
    noise: EmbeddingNoise | None = None,
    observe: Callable[[Batch], None] | None = None,
) -> Tensor:
    """Run megatron-core's schedule over the micro-batches of one global batch.

    Returns:
        [NUM_SUMS] fp64 sums over the global batch, the same on every rank.
    """
    rows, row_length = micro_batches[0].input_ids.shape
    local = _local_batches(micro_batches, device)
    iterators = [iter(local) for _ in chunks]
    forward_backward = get_forward_backward_func()
    store = forward_backward(
        forward_step_func=partial(_forward_step, noise or EmbeddingNoise(), observe),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(local),
        seq_length=row_length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
    if store and parallel_state.get_tensor_model_parallel_rank() == 0:
        sums += torch.stack(list(store)).sum(0)
    dist.all_reduce(sums)
    return sums.cpu()

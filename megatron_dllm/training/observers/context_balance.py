"""How evenly context parallelism shares the attention of a step: visible pairs of the busiest rank over the mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_dllm.config import ParallelConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.data.context_shard import deal_context
from megatron_dllm.diffusion.context_deal import load_ratio
from megatron_dllm.diffusion.roles import visible_keys
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.reports import StepReport


def row_ratios(micro_batches: Sequence[Batch], cp_size: int) -> list[float]:
    """Max over mean of visible pairs among `cp_size` ranks, for each row of these micro-batches of whole rows."""
    return [
        load_ratio(visible_keys(roles), tokens)
        for batch in micro_batches
        for roles, tokens in zip(batch.roles.numpy(), deal_context(batch, cp_size).numpy(), strict=True)
    ]


def context_balance(
    micro_batches: Sequence[Batch], parallel: ParallelConfig, data: ProcessGroup, device: torch.device
) -> dict[str, float]:
    """The ratio's mean and maximum over the rows of the global batch (a collective).

    Counts on the host what the rows are dealt by: call it where something is logged, not in every step.

    Args:
        micro_batches: this rank's, of whole rows.
        parallel: the layout; nothing is counted without context parallelism, nor with ulysses, where every rank has
            some heads of the whole row and the work is even whatever the deal.
        data: the ranks that read different rows.
        device: of the collective.
    """
    cp_size = parallel.context_parallel_size
    if cp_size == 1 or parallel.context_parallel_method == "ulysses":
        return {}
    ratios = torch.tensor(row_ratios(micro_batches, cp_size), dtype=torch.float64)
    total = torch.stack([ratios.sum(), torch.tensor(float(len(ratios)), dtype=torch.float64)]).to(device)
    largest = ratios.max().to(device)
    dist.all_reduce(total, group=data)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=data)
    return {"context_pairs/mean": float(total[0] / total[1]), "context_pairs/max": float(largest)}


@dataclass(frozen=True)
class ContextBalance(Observer):
    """Records how evenly logged steps were shared among context-parallel ranks."""

    parallel: ParallelConfig
    data: ProcessGroup
    device: torch.device

    def measure(self, report: StepReport) -> dict[str, Any]:
        """Mean and maximum over the rows (a collective)."""
        return dict(context_balance(report.micro_batches, self.parallel, self.data, self.device))

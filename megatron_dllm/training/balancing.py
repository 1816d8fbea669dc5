"""The AR loss of clean copies and AR rows beside the diffusion loss: two means with one weight between them.

    L = L_diff / N_diff + ar_weight * L_AR / N_AR

Both numbers of tokens are of the global batch and follow from its rows, before anything is computed. A step divides
once, by N_diff; so the loss weights of the AR targets are multiplied by ar_weight * N_diff / N_AR beforehand, and the
ordinary step trains. The factor is the same in every micro-batch and layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_dllm.data.batch import Batch
from megatron_dllm.parallel.groups import Groups


def balance_batches(
    micro_batches: Sequence[Batch], ar_weight: float, device: torch.device, groups: Groups
) -> list[Batch]:
    """The rows of a global batch with the weights of their AR targets (a collective where there are any).

    Args:
        micro_batches: this data-parallel rank's, of whole rows, on the host.
        ar_weight: of the AR loss; 0: the batches are what they were.
        device: where collectives lie.
        groups: of this rank.
    """
    if not ar_weight:
        return list(micro_batches)
    counts = torch.stack([torch.stack([b.num_maskable, b.num_ar_maskable]) for b in micro_batches]).sum(0).to(device)
    dist.all_reduce(counts, group=groups.data)
    num_noisy, num_clean = counts.tolist()
    if not num_noisy:  # AR rows alone: the step divides by N_AR
        micro_batches, num_noisy = [replace(b, num_maskable=b.num_ar_maskable) for b in micro_batches], num_clean
    return [_balanced(batch, ar_weight * num_noisy / max(num_clean, 1)) for batch in micro_batches]


def _balanced(batch: Batch, factor: float) -> Batch:
    factors = torch.where(batch.is_ar_target, factor, 1.0).double()
    balanced = replace(batch, loss_weights=(batch.loss_weights.double() * factors).float())
    return balanced.pin_memory() if batch.loss_weights.is_pinned() else balanced

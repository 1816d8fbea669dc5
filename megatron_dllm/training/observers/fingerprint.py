"""A number that says what a step was trained on: the order of its samples, their masks and noise levels.

Data and noise are pure functions of the seed, so the number is the same on every rank, in every layout and after a
resume. Where two runs differ, the first step with another number is where their data went apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_dllm.data.batch import Batch
from megatron_dllm.parallel.device import local_device
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.reports import StepReport

_DIGEST_BYTES = 32


def row_digests(batch: Batch) -> list[bytes]:
    """SHA-256 of every row of a micro-batch of whole rows: sample ids, tokens, masks, targets, weights and t."""
    digests = []
    for row in batch.split_rows():
        digest = hashlib.sha256()
        for part in row.digested():
            digest.update(np.ascontiguousarray(part.cpu().numpy()).tobytes())
        digests.append(digest.digest())
    return digests


def step_fingerprint(micro_batches: Sequence[Batch], data: ProcessGroup) -> str:
    """SHA-256 (hex) of a global batch, its rows in their global order (a collective of the data-parallel group).

    Args:
        micro_batches: this data-parallel rank's, before they are split over context-parallel ranks.
        data: the ranks that read different rows.

    Returns:
        The same text on every rank, whatever data-parallel size and micro-batch size are.
    """
    local = np.frombuffer(b"".join(digest for batch in micro_batches for digest in row_digests(batch)), np.uint8)
    rows = micro_batches[0].input_ids.shape[0]
    device = local_device()
    mine = torch.from_numpy(local.copy()).to(device)
    gathered = [torch.empty_like(mine) for _ in range(data.size())]
    dist.all_gather(gathered, mine, group=data)
    # Row k of micro-batch j of rank r is row (j * ranks + r) * rows + k of the global batch.
    by_rank = torch.stack(gathered).cpu().view(data.size(), len(micro_batches), rows, _DIGEST_BYTES)
    return hashlib.sha256(by_rank.transpose(0, 1).contiguous().numpy().tobytes()).hexdigest()


def check_agreement(fingerprint: str) -> None:
    """Compare a fingerprint over all ranks (a collective).

    Raises:
        RuntimeError: on every rank, naming the ranks that stand apart from the first.
    """
    device = local_device()
    number = int(fingerprint[:15], 16)
    extremes = torch.tensor([number, -number], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if extremes.sum() == 0:
        return
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, fingerprint)
    apart = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
    raise RuntimeError(
        f"ranks {apart} train on other samples, masks or noise levels than rank 0; "
        "they must read the same corpus with the same seed."
    )


@dataclass(frozen=True)
class DataFingerprint(Observer):
    """Records the fingerprint of logged steps, and ends the run where ranks disagree."""

    data: ProcessGroup

    def measure(self, report: StepReport) -> dict[str, Any]:
        """The fingerprint (a collective)."""
        fingerprint = step_fingerprint(report.micro_batches, self.data)
        check_agreement(fingerprint)
        return {"data_fingerprint": fingerprint}

"""How a step's micro-batches reach the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_dllm.data.batch import Batch
from megatron_dllm.model.pipeline import local_batches
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch


@dataclass
class _Group:
    """The first of so many ranks."""

    num_ranks: int

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self.num_ranks


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_copied_to_a_gpu_is_page_locked(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader locks whole rows; a context shard of them is new memory."""
    locked: list[Batch] = []
    # There is no GPU: the copy and the lock are only counted.
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: locked.append(batch) or batch)
    monkeypatch.setattr(Batch, "to", lambda batch, _: batch)
    batches = [tiny_batch(tiny_model(), [[40, 20]], row_length=128, block_size=4)]
    group: Any = _Group(size)
    got = local_batches(batches, group, torch.device("cuda"))
    assert got[0].input_ids.shape[1] == 128 // size
    assert [batch is shard for batch, shard in zip(locked, got, strict=False)] == [True] * (size - 1)

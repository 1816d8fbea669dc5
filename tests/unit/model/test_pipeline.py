"""How a step's micro-batches reach the device."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state

from megatron_dllm.data.batch import Batch
from megatron_dllm.model.pipeline import _local_batches
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_copied_to_a_gpu_is_page_locked(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader locks whole rows; a context shard of them is new memory."""
    locked: list[Batch] = []
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: size)
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: 0)
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: locked.append(batch) or batch)
    monkeypatch.setattr(Batch, "to", lambda batch, _: batch)
    batches = [tiny_batch(tiny_model(), [[40, 20]], row_length=128, block_size=4)]
    got = _local_batches(batches, torch.device("cuda"))
    assert got[0].input_ids.shape[1] == 128 // size
    assert [batch is shard for batch, shard in zip(locked, got, strict=False)] == [True] * (size - 1)

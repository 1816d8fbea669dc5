"""Collectives of a rank that is alone: what they return, and what is written down of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dllm.config import ParallelConfig
from megatron_dllm.parallel.fake_world import fake_world
from megatron_dllm.parallel.groups import Groups, group_labels
from megatron_dllm.planning.answer import Traffic
from megatron_dllm.planning.engine_ledger import Ledger
from megatron_dllm.planning.engine_values import KnownValues


@pytest.fixture
def groups() -> Iterator[Groups]:
    """Rank 3 of 4, with two context ranks."""
    with fake_world(ParallelConfig(context_parallel_size=2), 3, 4) as groups:
        yield groups


def _gather(group: dist.ProcessGroup, mine: Tensor) -> Tensor:
    everything = torch.empty(2 * len(mine), dtype=mine.dtype)
    dist.all_gather_into_tensor(everything, mine, group=group)
    return everything


def test_other_ranks_hold_what_this_one_holds(groups: Groups) -> None:
    with KnownValues(Ledger({}), 1.0):
        assert _gather(groups.context, torch.tensor([4, 7])).tolist() == [4, 7, 4, 7]


def test_other_ranks_hold_what_was_said(groups: Groups) -> None:
    peers = [[torch.tensor([1, 2]), torch.tensor([4, 7])]]
    with KnownValues(Ledger({}), 1.0, peers):
        assert _gather(groups.context, torch.tensor([4, 7])).tolist() == [1, 2, 4, 7]


def test_objects_of_all_ranks_are_this_ranks(groups: Groups) -> None:
    found: list[object] = [None] * 4
    with KnownValues(Ledger({}), 1.0):
        dist.all_gather_object(found, {"a": 1})
    assert found == [{"a": 1}] * 4


def test_calls_are_added_up_by_kind_and_group(groups: Groups) -> None:
    ledger = Ledger(group_labels())
    with KnownValues(ledger, 1.0):
        for _ in range(2):
            _gather(groups.context, torch.ones(10))
        dist.all_reduce(torch.ones(5), group=groups.data_context)
    assert ledger.traffic(3.0) == (
        Traffic("all_gather", "cp", (2, 3), calls=6, num_bytes=480),
        Traffic("all_reduce", "dp", (0, 1, 2, 3), calls=1, num_bytes=20),
    )

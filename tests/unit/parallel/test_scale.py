"""What a rank does at a start does not grow with the number of ranks: groups, exchanges, questions to the store."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import Store
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dllm.config import ParallelConfig

WIDE = ParallelConfig(
    tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2, expert_model_parallel_size=4
)


class CountCollectives(TorchDispatchMode):
    """How often each collective is called, and the bytes that go into it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.calls[func._schema.name] += 1
            self.num_bytes += sum(leaf.nbytes for leaf in tree_leaves(args) if hasattr(leaf, "nbytes"))
        return func(*args, **(kwargs or {}))


def _rank_of(world_size: int) -> tuple[int, Counter[str], int]:
    """The groups that rank 5 is in, and what it exchanges to hear that nothing has gone wrong."""
    from megatron_dllm.parallel.agreement import raise_together
    from megatron_dllm.parallel.fake_world import fake_world

    with fake_world(WIDE, 5, world_size), CountCollectives() as count:
        raise_together(None)
        return len(dist.distributed_c10d._world.pg_map), count.calls, count.num_bytes


def test_a_rank_of_1024_is_in_as_many_groups_as_one_of_32_and_exchanges_as_much() -> None:
    few, many = _rank_of(32), _rank_of(1024)
    assert few == many
    assert few[1] == {"c10d::allreduce_": 1} and few[2] == 8


class CountingStore(Store):
    """The launcher's store as one rank sees it when all others have come before, and what it is asked."""

    def __init__(self, values: dict[str, bytes], counts: dict[str, int]) -> None:
        super().__init__()
        self.values, self.counts = values, counts
        self.calls: Counter[str] = Counter()

    def set(self, key: str, value: Any) -> None:
        """Keep a value."""
        self.calls["set"] += 1
        self.values[key] = value if isinstance(value, bytes) else value.encode()

    def get(self, key: str) -> bytes:
        """A value that is there."""
        self.calls["get"] += 1
        return self.values[key]

    def add(self, key: str, amount: int) -> int:
        """Count."""
        self.calls["add"] += 1
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]

    def set_timeout(self, timeout: timedelta) -> None:
        """Nobody is waited for."""


@pytest.mark.parametrize("world_size", [2, 1024])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_asks_the_store_a_few_times(world_size: int, rank: int) -> None:
    from megatron_dllm.parallel.meeting import Meeting

    store = CountingStore({"start/decision": pickle.dumps("begin")}, {"start/num_checked": world_size - 1})
    meeting = Meeting(store, rank, world_size)
    assert meeting.decide(lambda: "begin") == "begin"
    meeting.agree(lambda: None)
    # Rank 0 tells its decision, another hears it and says so; the last to look at its machine says that all have.
    assert store.calls == ({"set": 2, "add": 2, "get": 1} if rank == 0 else {"set": 1, "add": 3, "get": 2})

"""The process groups of any rank of any layout, in one process: collectives go nowhere.

What runs in them is for counting: a collective returns at once and leaves its outputs as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dllm.config import ParallelConfig
from megatron_dllm.host import prepare_host
from megatron_dllm.parallel.groups import Groups, destroy, seed_everything, split_ranks

# No collective waits for another process.
_MINUTES = 1


@contextmanager
def fake_world(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[Groups]:
    """Be one of so many ranks while the block runs.

    Args:
        parallel: sizes of the layout, already validated for `world_size`.
        rank: which one.
        world_size: how many there are.

    Yields:
        The groups of that rank.
    """
    assert not dist.is_initialized(), "this process belongs to a real process group"
    prepare_host()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        split_ranks(parallel, _MINUTES)
        seed_everything(0)
        yield Groups.current()
    finally:
        destroy()

"""What ranks tell each other of the files they have written."""

from __future__ import annotations

import pickle

import torch.distributed as dist

from benchmarks.ranks import run_ranks
from megatron_dllm.checkpoint.reading_back import Checksums, gather_checksums, scatter_far
from tests.unit.parallel.test_scale import CountCollectives


def _written(rank: int) -> Checksums:
    return {f"__{rank}_0.distcp": {"size": 1000 + rank, "sha256": f"{rank}" * 64}}


def _told() -> tuple[list[Checksums] | None, Checksums, int]:
    """What this rank hears of all ranks, of another one, and the bytes that it exchanged for both."""
    dist.init_process_group("gloo")
    with CountCollectives() as count:
        parts = gather_checksums(_written(dist.get_rank()))
        return parts, scatter_far(parts), count.num_bytes


def test_rank_0_hears_of_all_files_and_a_rank_of_those_of_one_other() -> None:
    told = run_ranks(_told, 4)
    assert [parts for parts, _, _ in told] == [[*map(_written, range(4))], None, None, None]
    assert [part for _, part, _ in told] == [*map(_written, (2, 3, 0, 1))]
    # Its own words out, the other's in, and lengths of 8 bytes: of its words, of every rank's, of the longest and the
    # other's.
    length = len(pickle.dumps(_written(1)))
    assert [num_bytes for _, _, num_bytes in told[1:]] == [2 * length + 8 * (1 + 4 + 1 + 1)] * 3

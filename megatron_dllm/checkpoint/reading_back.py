"""What all ranks have written of a checkpoint: listed on rank 0, and read back by another rank.

A rank hears of its own share and no other, so that what it exchanges does not grow with the number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dllm.checkpoint.manifest import damaged_files

# Size and sha256 of a rank's files, by name.
Checksums = dict[str, dict[str, Any]]


def gather_checksums(mine: Checksums) -> list[Checksums] | None:
    """Those of every rank, on rank 0 alone (a collective)."""
    parts: list[Checksums] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts)
    return parts


def scatter_far(parts: list[Checksums] | None) -> Checksums:
    """Those of a rank far from this one, so of another node where there are several (a collective).

    Args:
        parts: of every rank, on rank 0: of ranks 0 to 3, rank 0 gets those of 2, 1 of 3, 2 of 0, 3 of 1.
    """
    shares = None
    if parts is not None:
        far = max(1, len(parts) // 2)
        shares = parts[far:] + parts[:far]
    received: list[Checksums] = [{}]
    dist.scatter_object_list(received, shares)
    return received[0]


def altered_file(folder: Path, parts: list[Checksums] | None) -> Exception | None:
    """Read another rank's files (a collective); an error where they are not what it wrote.

    Args:
        folder: of the checkpoint.
        parts: what every rank has written, on rank 0.
    """
    part = scatter_far(parts)
    try:
        problems = damaged_files(folder, part, part)
    except OSError as error:
        return RuntimeError(f"reading back {folder}: {error}")
    return RuntimeError(f"{problems[0]}; the storage does not keep what is written to it") if problems else None

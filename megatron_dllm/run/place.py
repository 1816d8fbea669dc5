"""This process's place in the run, read from the environment that the launcher sets (standard library only)."""

from __future__ import annotations

import os


def world_size() -> int:
    """Number of ranks (torchrun's WORLD_SIZE); 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank_zero() -> bool:
    """Whether this process is the first of the run: the one that logs and writes shared files."""
    return int(os.environ.get("RANK", "0")) == 0

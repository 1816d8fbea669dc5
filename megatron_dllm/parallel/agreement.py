"""What goes wrong on one rank, known to all of them."""

from __future__ import annotations

import torch.distributed as dist

from megatron_dllm.run.disk_full import DiskFull
from megatron_dllm.run.lease import LeaseLost

# Errors that keep their kind on the ranks where they did not occur.
_KINDS: tuple[type[Exception], ...] = (ValueError, LeaseLost)


def raise_together(error: Exception | None) -> None:
    """Raise on every rank what went wrong on any, naming the rank: no rank is left waiting for another.

    ValueError, LeaseLost and DiskFull stay what they are, anything else becomes a RuntimeError.
    """
    mine = None if error is None else (type(error).__name__, str(error))
    errors: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    failed = [(rank, *entry) for rank, entry in enumerate(errors) if entry is not None]
    if not failed:
        return
    rank, kind, text = failed[0]
    for known in _KINDS:
        if known.__name__ == kind:
            raise known(text) from error
    if kind == DiskFull.__name__:  # a disk may be that of one machine
        raise DiskFull(f"rank {rank} of {len(errors)} failed: {text}") from error
    raise RuntimeError(f"checkpoint: rank {rank} of {len(errors)} failed: {kind}: {text}") from error

"""What goes wrong on one rank, known to all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_dllm.parallel.device import local_device
from megatron_dllm.run.command import sentence
from megatron_dllm.run.disk_full import DiskFull
from megatron_dllm.run.lease import LeaseLost

# Errors that keep their kind and their words on the ranks where they did not occur.
_KINDS: tuple[type[Exception], ...] = (ValueError, LeaseLost)
# Those that keep their kind, and name the rank: a disk may be that of one machine.
_PLACES: tuple[type[OSError], ...] = (DiskFull, OSError)


def raise_together(error: Exception | None) -> None:
    """Raise on every rank what went wrong on any (a collective): no rank is left waiting for another.

    ValueError, LeaseLost, DiskFull and what the operating system refuses (OSError) stay what they are, anything else
    becomes a RuntimeError. Where nothing has gone wrong the ranks add up one number; words are exchanged only then.
    """
    has_failed = torch.tensor([int(error is not None)], device=local_device())
    dist.all_reduce(has_failed, op=dist.ReduceOp.MAX)
    if not has_failed.item():
        return
    mine = None if error is None else (_kind(error), str(error) if _kind(error) != "OSError" else sentence(error))
    errors: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    rank, kind, text = next((rank, *entry) for rank, entry in enumerate(errors) if entry is not None)
    for known in _KINDS:
        if known.__name__ == kind:
            raise known(text) from error
    where = f"rank {rank} of {len(errors)} failed"
    for place in _PLACES:
        if place.__name__ == kind:
            raise place(f"{where}: {text}") from error
    raise RuntimeError(f"{where}: {kind}: {text}") from error


def _kind(error: Exception) -> str:
    """The class's name; OSError for whatever the operating system says."""
    return "OSError" if isinstance(error, OSError) and error.errno is not None else type(error).__name__


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise on every rank what the operating system refuses to any of them in a block (a collective at its end).

    The block itself must be no collective once it has written.
    """
    error: OSError | None = None
    try:
        yield
    except OSError as caught:
        error = caught
    raise_together(error)

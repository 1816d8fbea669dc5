"""A bar on rank 0's terminal while rows are scored."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import track

from megatron_dllm.data.loader import BatchLoader, GlobalStep
from megatron_dllm.run.place import is_rank_zero


def watched(loader: BatchLoader, label: str | None) -> Iterable[GlobalStep]:
    """The steps of a loader, counted by a bar on standard error that is gone when they are over.

    Args:
        loader: that comes to an end.
        label: of the bar; None: there is none.
    """
    if label is None or not is_rank_zero():
        return loader
    return track(loader, label, loader.num_steps, console=Console(stderr=True), transient=True)

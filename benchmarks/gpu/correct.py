"""Whether the device computes what it should: kernels against their definitions, and whole runs against the CPU's.

Kernels are checked in this process. The runs are the product's commands, each a process of its own, several beside
each other: most of their time goes into starting and compiling, and nothing here is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.checks import run_beside, run_checks
from benchmarks.gpu.kernels import kernel_checks
from benchmarks.gpu.runs import run_chains, start_check
from benchmarks.gpu.settings import Settings


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """One row for every check, as soon as it is done."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    yield from run_checks(settings, start_check(settings))
    chains = run_chains(settings)
    if settings.is_small:  # a machine with few cores
        one_after_another = {name: check for chain in chains for name, check in chain.items()}
        yield from run_checks(settings, kernel_checks(settings) | one_after_another)
    else:
        yield from run_beside(settings, kernel_checks(settings), chains)

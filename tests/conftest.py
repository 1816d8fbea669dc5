"""What all tests share: megatron-core on one rank, and a last word on tests that did not run for want of a program."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

# Before torch is imported: sums come out alike whatever the machine, and workers do not fight for its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester", "tests.plugins.tiers", "tests.plugins.cpu_seconds"]

# A skip whose reason begins so must not be overlooked.
NOT_RUN = "NOT RUN: "


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print such reasons in red, however quiet pytest is asked to be."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    for reason, count in reasons.items():
        if reason.startswith(NOT_RUN):
            terminalreporter.write_line(f"{count} test{'s' * (count > 1)} {reason}", red=True, bold=True)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Any]:
    """megatron-core on this process alone, as `Groups`."""
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.parallel.groups import single_rank

    with single_rank(0) as groups:
        yield groups

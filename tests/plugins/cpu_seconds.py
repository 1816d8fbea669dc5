"""Counts what tests cost: CPU seconds of pytest and of every process that a test has started, by tier.

CPU seconds, unlike seconds, are nearly the same on a busy machine. A process that outlives the one that started it is
no longer found, so what a test costs that kills processes is a lower bound.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.tiers import TIERS, tier_of

# Fields of /proc/PID/stat behind the name: the parent, and user and system time of the process and its dead children.
_PARENT, _TIMES = 1, slice(11, 15)
_TICKS = os.sysconf("SC_CLK_TCK")


def tree_cpu_seconds() -> float:
    """CPU seconds so far of this process and of all its descendants."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        pid = int(path.parent.name)
        parents[pid], ticks[pid] = int(fields[_PARENT]), sum(map(int, fields[_TIMES]))
    children = defaultdict(list)
    for pid, parent in parents.items():
        children[parent].append(pid)
    total, found = 0, [os.getpid()]
    while found:
        pid = found.pop()
        total += ticks.get(pid, 0)
        found += children[pid]
    return total / _TICKS


class CpuSeconds:
    """Sums up the CPU seconds of every test and prints them at the end."""

    def __init__(self) -> None:
        self._by_tier: dict[str, float] = dict.fromkeys(TIERS, 0.0)
        self._by_test: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Note where the clock stands before a test; the reports of its phases take the difference."""
        item.stash[_CLOCK] = _clock(item)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """Put the CPU seconds of a phase into its report, which travels from a worker of xdist to its controller."""
        report = yield
        before, item.stash[_CLOCK] = item.stash[_CLOCK], _clock(item)
        report.tier, report.cpu_seconds = tier_of(item), max(0.0, item.stash[_CLOCK] - before)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a phase's seconds to those of its test and its tier."""
        if not hasattr(report, "cpu_seconds"):  # of a worker that died
            return
        self._by_tier[report.tier] += report.cpu_seconds
        self._by_test[report.nodeid] += report.cpu_seconds

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print a line a tier, and the dearest tests where pytest is asked for durations."""
        terminalreporter.section("CPU seconds")
        for tier, seconds in self._by_tier.items():
            if seconds:
                terminalreporter.write_line(f"{seconds:8.1f}  {tier}")
        # With workers of xdist it cannot be told: what they started and did not wait for is gone with them.
        if not getattr(terminalreporter.config.option, "numprocesses", None):
            terminalreporter.write_line(f"{tree_cpu_seconds():8.1f}  in all, imports and collection included")
        number = terminalreporter.config.getoption("durations") or 0
        for test, seconds in sorted(self._by_test.items(), key=lambda entry: -entry[1])[:number]:
            terminalreporter.write_line(f"{seconds:8.1f}  {test}")


_CLOCK = pytest.StashKey[float]()


def _clock(item: pytest.Item) -> float:
    """CPU seconds so far; a fast test starts no process, so its own are enough, and they are cheap to read."""
    return time.process_time() if tier_of(item) == "fast" else tree_cpu_seconds()


def pytest_configure(config: pytest.Config) -> None:
    """Begin counting."""
    config.pluginmanager.register(CpuSeconds(), "cpu_seconds_of_tests")

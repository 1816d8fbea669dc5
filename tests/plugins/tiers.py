"""Gives every test its tier, and fails a fast test that starts a process or compiles.

    fast   in this process alone, nothing compiled: tests/unit
    ranks  gloo ranks or other processes: tests/distributed, tests/golden, tests/integration
    slow   some twenty seconds of CPU or more, or compiles
    slurm  needs a real SLURM: tests/slurm; those that another test covers more briefly are slow too

A test's folder gives its tier; a mark of its own (@pytest.mark.ranks, @pytest.mark.slow) goes before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

# From the longest to the shortest: a test is of the first tier whose mark it carries.
TIERS = ("slurm", "slow", "ranks", "fast")
TIER_OF_FOLDER = {"unit": "fast", "distributed": "ranks", "golden": "ranks", "integration": "ranks", "slurm": "slurm"}
TESTS = Path(__file__).resolve().parents[1]

# What Python reports to audit hooks before it starts a process.
_STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
# Whatever records the commit it was made by asks git, in some milliseconds.
_ALLOWED = {"git"}
_REMEDY = "mark it @pytest.mark.ranks (@pytest.mark.slow if it compiles), or test the function in this process"


def tier_of(item: pytest.Item) -> str:
    """The tier of a collected test."""
    return next(tier for tier in TIERS if item.get_closest_marker(tier) is not None)


def folder_tier(path: Path) -> str:
    """The tier of the tests of a file.

    Raises:
        ValueError: for a folder whose tier is not known.
    """
    folder = path.resolve().relative_to(TESTS).parts[0]
    if folder not in TIER_OF_FOLDER:
        raise ValueError(f"tests/{folder} has no tier; add it to TIER_OF_FOLDER in {Path(__file__).name}.")
    return TIER_OF_FOLDER[folder]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what carries no mark of a tier with that of its folder."""
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in TIERS):
            item.add_marker(folder_tier(item.path))


class HonestFastTier:
    """Refuses to start a process while a fast test runs, its fixtures included, and fails one that compiles."""

    def __init__(self) -> None:
        self._is_watching = False
        self._caught: list[str] = []
        sys.addaudithook(self._audit)  # cannot be taken back, so one for the whole session

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._is_watching and event in _STARTS:
            program = arguments[0] if arguments else ""
            if program not in _ALLOWED:
                self._refuse(f"{event} {program}".strip())

    def _refuse(self, what: str) -> None:
        self._caught.append(f"starts a process ({what})")
        raise RuntimeError(f"a fast test {self._caught[-1]}; {_REMEDY}.")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Watch a fast test from its first fixture to its last."""
        if tier_of(item) != "fast":
            return (yield)
        self._is_watching, self._caught = True, []
        try:
            with pytest.MonkeyPatch.context() as patch:
                # Neither spawn nor a fork server, once it runs, is reported to audit hooks.
                patch.setattr(BaseProcess, "start", lambda process: self._refuse(f"multiprocessing {process.name}"))
                return (yield)
        finally:
            self._is_watching = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Fail the test also where the code under test has swallowed the refusal, and where it compiles."""
        if not self._is_watching:
            return (yield)
        before = _num_compiled()
        result = yield
        if _num_compiled() > before:
            self._caught.append("compiles (torch.compile)")
        if self._caught:
            pytest.fail(f"a fast test {', '.join(self._caught)}; {_REMEDY}.")
        return result


def _num_compiled() -> int:
    """Functions that torch.compile has compiled so far; torch is not imported for the answer."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["frames"]["total"] if dynamo else 0


def pytest_configure(config: pytest.Config) -> None:
    """Watch over the fast tier."""
    config.pluginmanager.register(HonestFastTier(), "honest_fast_tier")

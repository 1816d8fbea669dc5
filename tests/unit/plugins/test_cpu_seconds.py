"""The CPU seconds of a tier count the processes that its tests start."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from tests.plugins.cpu_seconds import tree_cpu_seconds

BURN = "import time\nwhile time.process_time() < {seconds}: pass"


@pytest.mark.ranks
def test_a_child_counts_while_it_runs_and_when_it_has_ended() -> None:
    before = tree_cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", BURN.format(seconds=0.3) + "\ninput()"], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while (running := tree_cpu_seconds() - before) < 0.25:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.communicate(b"\n")
    assert child.returncode == 0
    assert tree_cpu_seconds() - before >= running


@pytest.mark.ranks
def test_the_summary_tells_the_seconds_of_each_tier(pytester: pytest.Pytester) -> None:
    burn = BURN.format(seconds=0.3)
    pytester.makepyfile(f"""
        import subprocess, sys, time, pytest

        @pytest.mark.ranks
        def test_of_another_process():
            subprocess.run([sys.executable, "-c", {burn!r}], check=True)

        @pytest.mark.fast
        def test_of_this_one():
            end = time.process_time() + 0.1
            while time.process_time() < end:
                pass
    """)
    result = pytester.runpytest_inprocess("-p", "tests.plugins.tiers", "-p", "tests.plugins.cpu_seconds")
    result.assert_outcomes(passed=2)
    seconds = {tier: float(number) for number, tier in re.findall(r"(\d+\.\d)  (\w+)", result.stdout.str())}
    assert seconds["ranks"] >= 0.25 and seconds["fast"] >= 0.1
    assert seconds["in"] >= seconds["ranks"] + seconds["fast"] - 0.1

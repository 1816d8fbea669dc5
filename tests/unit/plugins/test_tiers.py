"""Every test has a tier, and the fast ones keep to theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.tiers import TESTS, TIER_OF_FOLDER, folder_tier

TRY = """
import multiprocessing, os, subprocess
import pytest

def nothing():
    pass

{decorator}
def test_something({arguments}):
    {body}
"""
STARTS = {
    "subprocess": "subprocess.run(['true'])",
    "fork": "os.fork() or os._exit(0)",
    "system": "os.system('true')",
    "spawn": "multiprocessing.get_context('spawn').Process(target=nothing).start()",
    "forkserver": "multiprocessing.get_context('forkserver').Process(target=nothing).start()",
}


def outcome(pytester: pytest.Pytester, tier: str, body: str, before: str = "", arguments: str = "") -> pytest.RunResult:
    """Run one test of a tier in this process."""
    pytester.makepyfile(
        TRY.format(decorator=f"{before}\n@pytest.mark.{tier}", arguments=arguments, body=body.replace("\n", "\n    "))
    )
    return pytester.runpytest_inprocess("-p", "tests.plugins.tiers")


@pytest.mark.ranks
@pytest.mark.parametrize("way", STARTS)
def test_a_fast_test_that_starts_a_process_fails_and_is_told_what_to_do(pytester: pytest.Pytester, way: str) -> None:
    result = outcome(pytester, "fast", STARTS[way])
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*a fast test starts a process (*mark it @pytest.mark.ranks*"])


@pytest.mark.ranks
def test_neither_a_swallowed_refusal_nor_a_fixture_goes_through(pytester: pytest.Pytester) -> None:
    swallowed = "try:\n    subprocess.run(['true'])\nexcept RuntimeError:\n    pass"
    outcome(pytester, "fast", swallowed).assert_outcomes(failed=1)
    fixture = "@pytest.fixture(scope='module')\ndef started():\n    subprocess.run(['true'])\n"
    outcome(pytester, "fast", "pass", fixture, "started").assert_outcomes(errors=1)


@pytest.mark.ranks
def test_other_tiers_start_what_they_like(pytester: pytest.Pytester) -> None:
    for tier in ("ranks", "slow"):
        outcome(pytester, tier, STARTS["subprocess"]).assert_outcomes(passed=1)
    for harmless in ("pass", "subprocess.run(['git', '--version'])"):
        outcome(pytester, "fast", harmless).assert_outcomes(passed=1)


@pytest.mark.slow
def test_a_fast_test_that_compiles_fails(pytester: pytest.Pytester) -> None:
    compiles = "import torch\ntorch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))"
    result = outcome(pytester, "fast", compiles)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*a fast test compiles (torch.compile); mark it*"])


def test_every_folder_of_tests_has_a_tier() -> None:
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert folders == TIER_OF_FOLDER.keys()
    assert folder_tier(Path(__file__)) == "fast"
    with pytest.raises(ValueError, match="tests/elsewhere has no tier; add it to TIER_OF_FOLDER"):
        folder_tier(TESTS / "elsewhere" / "test_x.py")

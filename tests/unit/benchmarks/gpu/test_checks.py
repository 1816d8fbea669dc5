"""A check becomes one row whatever happens in it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.checks import Found, NotHere, run_beside, run_checks
from benchmarks.gpu.settings import Settings


def raising(error: Exception) -> Found:
    raise error


def test_every_check_gives_a_row_and_none_ends_the_part(tmp_path: Path) -> None:
    checks = {
        "good": lambda: Found(1.0, 2.0, "where", {"more": 3}),
        "too large": lambda: Found(3.0, 2.0),
        "no number": lambda: Found(float("nan"), 2.0),
        "broken": lambda: raising(RuntimeError("what went wrong")),
        "not here": lambda: raising(NotHere("no such device")),
        "recorded": lambda: Found("a word"),
    }
    rows = {row["check"]: row for row in run_checks(Settings("cpu", True, tmp_path, 60.0), checks)}
    expected = dict(zip(checks, ("ok", "failed", "failed", "failed", "skipped", "ok"), strict=True))
    assert {name: row["status"] for name, row in rows.items()} == expected
    assert rows["good"]["more"] == 3 and rows["good"]["why"] == "where" and rows["good"]["seconds"] >= 0.0
    assert "what went wrong" in rows["broken"]["why"] and rows["not here"]["why"] == "no such device"


def test_checks_that_the_time_does_not_reach_are_skipped(tmp_path: Path) -> None:
    (row,) = run_checks(Settings("cpu", True, tmp_path, -1.0), {"late": lambda: raising(AssertionError("it ran"))})
    assert row["status"] == "skipped" and "over" in row["why"]


def test_chains_beside_give_all_of_their_rows(tmp_path: Path) -> None:
    settings = Settings("cpu", True, tmp_path, 60.0)
    own = {f"own {number}": lambda: Found(1.0) for number in range(3)}
    chains = [{f"{chain} {number}": lambda: Found(2.0) for number in range(2)} for chain in ("a", "b")]
    rows = [row["check"] for row in run_beside(settings, own, chains)]
    assert sorted(rows) == sorted([*own, *chains[0], *chains[1]])
    assert [name for name in rows if name.startswith("own")] == list(own)
    assert [row["check"] for row in run_beside(settings, own, [])] == list(own)
    assert [row["check"] for row in run_beside(settings, {}, chains[:1])] == list(chains[0])

"""The study of methods: its runs can be, their tokens or operations are equal, and its tables claim no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.methods_study import EQUAL, METHODS, OPERATIONS, REFERENCE, TOKENS, equal_tokens, main, method_config
from benchmarks.methods_table import is_clear, picture, rows_of

RESULTS = [
    {
        "method": name,
        "equal": TOKENS,
        "seed": seed,
        "document_tokens": 1000,
        "operations": 2.5e9,
        "elbo": elbo + 0.1 * seed,
        "seconds": 2.0,
    }
    for name, elbos in {"wsd": (2.0, 2.0, 2.0), "jump": (1.9, 1.91, 1.89), "llada": (2.2, 1.8, 2.1)}.items()
    for seed, elbo in enumerate(elbos)
]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", EQUAL)
def test_every_method_is_a_run_of_its_tokens(name: str, kind: str, tmp_path: Path) -> None:
    method = METHODS[name]
    tokens = equal_tokens(method, kind, 400_000)
    config = method_config(tmp_path, "run", method, 1, tokens)
    config.validate(1)
    assert sum(stage.num_tokens or 0 for stage in config.schedule.stages.values()) == pytest.approx(tokens, abs=9)
    if kind == OPERATIONS:
        assert tokens * method.cost == pytest.approx(400_000 * METHODS[REFERENCE].cost)


def test_what_computes_more_gets_fewer_tokens() -> None:
    tokens = {name: equal_tokens(METHODS[name], OPERATIONS, 1000) for name in ("fast_dllm", "jump", "wsd", "llada")}
    assert tokens["fast_dllm"] < tokens["jump"] < tokens["wsd"] == 1000 < tokens["llada"]


def test_the_best_comes_first_and_only_what_exceeds_the_spread_is_clear() -> None:
    rows = {row["method"]: row for row in rows_of(RESULTS, REFERENCE)}
    assert list(rows) == ["jump", "wsd", "llada"]
    assert rows["jump"]["gain"] == "0.1000 ± 0.0100" and rows["jump"]["clear"] == "yes"
    assert rows["llada"]["clear"] == "no" and rows["wsd"]["clear"] == rows["wsd"]["gain"] == ""
    assert is_clear([0.3]) == "?"
    assert picture(RESULTS, REFERENCE).startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path: Path) -> None:
    words = ["--study", str(tmp_path / "study"), "--output", str(tmp_path / "table"), "--seeds", "1"]
    words += ["--tokens", "6000", "--base_tokens", "6000", "--methods", "jump", "dream"]
    assert main(words) == 0
    written = (tmp_path / "table.md").read_text()
    assert "equal tokens" in written and "equal operations" in written and "dream" in written
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("*/*/result.json")}
    assert {path.parent.parent.name for path in before} == {"6000_6000"}  # runs of other lengths lie elsewhere
    assert len(before) == 4 and main(words) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}

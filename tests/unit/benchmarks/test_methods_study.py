"""The study of methods: its runs can be, their tokens or operations are equal, and its tables claim no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.methods_study import EQUAL, METHODS, OPERATIONS, REFERENCE, TOKENS, equal_run, jobs_of, main
from benchmarks.methods_table import is_clear, picture, rows_of, write_methods
from benchmarks.study_corpus import write_corpora
from benchmarks.study_cost import mean_operations, model_tokens
from benchmarks.study_jobs import Lengths, num_tokens
from tests.unit.benchmarks.refusals import assert_refused

RESULTS = [
    {
        "method": name,
        "equal": TOKENS,
        "seed": seed,
        "document_tokens": 1000,
        "operations": 2.5e9,
        "elbo": elbo + 0.1 * seed,
        "ar_nll": 1.0,
        "model_tokens": 2.0,
        "seconds_per_token": 0.0125,
        "seconds": 2.0,
    }
    for name, elbos in {"wsd": (2.0, 2.0, 2.0), "jump": (1.9, 1.91, 1.89), "llada": (2.2, 1.8, 2.1)}.items()
    for seed, elbo in enumerate(elbos)
]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", EQUAL)
def test_every_method_is_a_run_of_its_tokens(name: str, kind: str, tmp_path: Path) -> None:
    config, reference = (equal_run(tmp_path, method, kind, 1, 400_000) for method in (name, REFERENCE))
    config.validate(1)
    if kind == TOKENS:
        assert num_tokens(config) == pytest.approx(400_000, abs=9)
    else:
        expected = num_tokens(reference) * mean_operations(reference)
        assert num_tokens(config) * mean_operations(config) == pytest.approx(expected, rel=1e-4)


def test_what_computes_more_gets_fewer_tokens(tmp_path: Path) -> None:
    names = ("fast_dllm", "growth, distilled from the base", "jump", "wsd", "llada")
    tokens = [num_tokens(equal_run(tmp_path, name, OPERATIONS, 1, 400_000)) for name in names]
    assert tokens == sorted(tokens) and len(set(tokens)) == len(names) and tokens[3] == 400_000


def test_model_tokens_by_hand(tmp_path: Path) -> None:
    """Of a document token: its views, and its clean copy but for the last of 8 blocks; of full attention itself."""
    names = ("llada", "jump", "fast_dllm", "growth, clean blocks of 1, AR loss")
    found = [model_tokens(equal_run(tmp_path, name, TOKENS, 1, 400_000)) for name in names]
    assert found == pytest.approx([1.0, 1.0 + 7 / 8, 2.0 + 7 / 8, 2.0 - 1 / 256], abs=0.003)


def test_all_methods_run_with_a_seed_before_the_next(tmp_path: Path) -> None:
    jobs = list(jobs_of(tmp_path, ["wsd", "jump"], 2, Lengths(400_000, 10**6, 8)))
    runs = ["wsd, equal tokens", "jump, equal tokens", "wsd, equal operations", "jump, equal operations"]
    assert [job.name for job in jobs] == ["AR model", *(f"seed {seed}, {run}" for seed in (1, 2) for run in runs)]
    assert len({job.result for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "5000"], r"tokens \(5000\) must be at least \d{5}, so that the shortest stage"),
        (["--base_tokens", "0"], r"base_tokens \(0\) must be at least 2048"),
        (["--seeds", "0"], r"seeds \(0\) must be positive"),
    ],
)
def test_what_no_run_could_do_is_refused_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path
) -> None:
    assert_refused(main, words, message, tmp_path)


def test_the_best_comes_first_and_only_what_exceeds_the_spread_is_clear() -> None:
    rows = {row["method"]: row for row in rows_of(RESULTS, REFERENCE)}
    assert list(rows) == ["jump", "wsd", "llada"]
    assert rows["jump"]["gain"] == "0.1000 ± 0.0100" and rows["jump"]["clear"] == "yes"
    assert rows["llada"]["clear"] == "no" and rows["wsd"]["clear"] == rows["wsd"]["gain"] == ""
    assert rows["jump"]["model tokens"] == "2.00" and rows["jump"]["ms a token"] == "12.50"
    assert is_clear([0.3]) == "?"
    # Their standard error is 0.01; with two seeds the mean must be 12.7 of them from zero, with three 4.3.
    assert is_clear([0.13, 0.15]) == "yes" and is_clear([0.11, 0.13]) == "no"
    assert is_clear([-0.045 + step * 0.03**0.5 / 10 for step in (-1, 0, 1)]) == "yes"
    assert is_clear([-0.041 + step * 0.03**0.5 / 10 for step in (-1, 0, 1)]) == "no"
    assert picture(RESULTS, REFERENCE).startswith(b"\x89PNG")


def test_nothing_measured_is_no_table(tmp_path: Path) -> None:
    write_methods([], tmp_path / "table", {}, REFERENCE)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In steps of a row, the reference, a frozen teacher and random pairs among the methods."""
    write_corpora(tmp_path / "study", num_documents=200, max_bytes=150_000, num_chats=40, num_questions=2)
    words = ["--study", str(tmp_path / "study"), "--output", str(tmp_path / "table"), "--seeds", "1", "--rows", "1"]
    words += ["--tokens", "6000", "--base_tokens", "2000", "--methods", "wsd", "growth, distilled from the base"]
    words += ["diffullama, opening at random"]
    assert main(words) == 0
    written = (tmp_path / "table.md").read_text()
    assert "equal tokens" in written and "equal operations" in written and "opening at random" in written
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("*/*/result.json")}
    assert {path.parent.parent.name for path in before} == {"2000_6000_1"}  # runs of other lengths lie elsewhere
    capsys.readouterr()
    assert len(before) == 6 and main(words) == 0
    assert "7 jobs, 7 of them done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}

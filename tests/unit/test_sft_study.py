"""The table of the study: means and spreads over seeds, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.sft_study import ARMS, main
from megatron_dllm.evaluation.answer_scores import AnswerScores, TaskScore, ThresholdScores, write_answer_scores


def write_study(folder: Path, seeds: dict[str, int]) -> None:
    """Answers of some seeds: seed s answers s + 5 of 10 questions right."""
    for arm, num_seeds in seeds.items():
        for seed in range(1, num_seeds + 1):
            tasks = {"add": TaskScore(5, seed, 10, 10), "sort": TaskScore(5, 5, 10 * seed, 10)}
            thresholds = [ThresholdScores(threshold, tasks) for threshold in (0.5, 0.9)]
            scores = AnswerScores(f"{arm}_{seed}", "held_out.jsonl", 32, thresholds, 0.9, [])
            write_answer_scores(folder / f"answers_{arm}_{seed}.json", scores)


@pytest.mark.ranks  # the commit is asked of git
def test_mean_and_spread_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path, dict.fromkeys(ARMS, 3))
    assert main(["--study", str(tmp_path), "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "results" / "tiny_sft_study.md").read_text()
    # Accuracies 0.6, 0.7, 0.8; tokens per forward 20/20, 30/20, 40/20; the sums alone 0.2, 0.4, 0.6.
    assert "over 3 seeds" in text and text in capsys.readouterr().out
    assert "| SFT from random weights | accuracy | 0.70 ± 0.10 | 0.70 ± 0.10 |" in text
    assert "| SFT and CAP from the converted model | tokens per forward | 1.50 ± 0.50 | 1.50 ± 0.50 |" in text
    assert "| accuracy at 0.9 | add | sort |" in text
    assert "| SFT from the converted model | 0.40 ± 0.20 | 1.00 ± 0.00 |" in text
    table = json.loads((tmp_path / "results" / "tiny_sft_study.json").read_text())
    assert table["cap"][1]["0.9"] == {"add": [0.4, 1.0], "sort": [1.0, 2.0], "all": [0.7, 1.5]}


def test_a_study_that_is_not_finished_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path, {"sft": 3, "cap": 2, "scratch": 3})
    assert main(["--study", str(tmp_path), "--results", str(tmp_path / "results")]) == 2
    assert "has measured {'sft': 3, 'cap': 2, 'scratch': 3} seeds" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()

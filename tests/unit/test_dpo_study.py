"""The table of the study of preferences: means and spreads over seeds, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.dpo_study import ARMS, START, main
from megatron_dllm.evaluation.answer_scores import AnswerScores, TaskScore, ThresholdScores, write_answer_scores
from megatron_dllm.evaluation.scores_file import write_scores
from tests.unit.evaluation.made_header import HEADER


def write_seed(folder: Path, name: str, num_right: int, gains: list[float]) -> None:
    """A seed with so many right answers of 10, and scores that exceed -2, -4, -6, -8 by `gains`, two views alike."""
    tasks = {"add": TaskScore(5, num_right - 5, 10, 10), "sort": TaskScore(5, 5, 10, 10)}
    thresholds = [ThresholdScores(threshold, tasks) for threshold in (0.5, 0.9)]
    write_answer_scores(folder / f"answers_{name}.json", AnswerScores(name, "held_out.jsonl", 32, thresholds, 0.9, []))
    scores = (np.array([-2.0, -4.0, -6.0, -8.0]) + gains).astype(np.float32)
    by_view = np.stack([scores - 1, scores + 1], axis=-1)[None]
    header = type(HEADER)(**{**vars(HEADER), "noise": {"num_views": 2}, "num_documents": 4, "num_epochs": 1})
    write_scores(folder / f"held_out_{name}.scores", header, by_view)


def write_study(folder: Path, num_seeds: int) -> None:
    write_seed(folder, START, 7, [0.0] * 4)
    for arm in ARMS:
        for seed in range(1, num_seeds + 1):
            # One pair of two is moved towards its chosen side; of seed 1 both are.
            write_seed(folder, f"{arm}_{seed}", 6 + seed, [1.0, -1.0, 0.0, -2.0 if seed == 1 else 2.0])


@pytest.mark.ranks  # the commit is asked of git
def test_mean_and_spread_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path, 3)
    assert main(["--study", str(tmp_path), "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "results" / "tiny_dpo_study.md").read_text()
    assert "over 3 seeds" in text and text in capsys.readouterr().out
    assert "| before preferences | 0.700 | 0.400 | 1.000 |  | 4.000 | 6.000 |" in text
    # Accuracies 0.7, 0.8, 0.9; margins 1, 0.5, 0.5; chosen 1 and 6 nats; rejected 5 and 10, 6, 6.
    found = "| 0.800 ± 0.100 | 0.600 ± 0.200 | 1.000 ± 0.000 | 0.667 ± 0.289 | 3.500 ± 0.000 | 6.167 ± 1.155 |"
    assert all(f"| {label} {found}" in text for label in ARMS.values())
    table = json.loads((tmp_path / "results" / "tiny_dpo_study.json").read_text())
    assert table["k4"][0]["margin_accuracy"] == 1.0 and table["k4"][1]["of_tasks"] == {"add": 0.6, "sort": 1.0}
    assert (tmp_path / "results" / "tiny_dpo_study.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_that_is_not_finished_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path, 2)
    (tmp_path / "answers_k8_2.json").unlink()
    assert main(["--study", str(tmp_path), "--results", str(tmp_path / "results")]) == 2
    assert "'k4': 2, 'k8': 1" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()

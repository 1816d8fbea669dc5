"""What a run of tasks has written is read without lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dllm.evaluation.task_results import Metric, metrics_of, read_task_results
from tests.unit.evaluation.made_results import harness_content, write_harness


def test_numbers_errors_and_settings_are_read(tmp_path: Path) -> None:
    found = read_task_results(write_harness(tmp_path / "harness.json", acc=0.5))
    assert found.metrics == [
        Metric("quiz", "acc", 0.5, 0.1),
        Metric("quiz", "acc_norm", 0.25, 0.1),
        Metric("sums", "exact_match, strict-match", 0.75, None),
        Metric("sums", "tokens per forward", 2.5, None),
    ]
    assert found.metric("sums", "exact_match, strict-match") == found.metrics[2] and found.metric("sums", "acc") is None
    assert (found.weights, found.scored_as, found.unsure) == ("runs/sft", "ELBO, block 32", {"quiz": (3, 40)})
    assert found.settings["likelihood.estimator"] == "auto" and found.settings["questions of quiz"] == 40
    assert "weights" not in found.settings


def test_an_autoregressive_model_is_scored_exactly(tmp_path: Path) -> None:
    path = write_harness(tmp_path / "harness.json", settings={"block_size": None, "likelihood": "exact"})
    assert read_task_results(path).scored_as == "exact NLL"


def test_names_and_nulls_are_no_numbers() -> None:
    results = {"quiz": {"alias": "quiz", "acc,none": 1, "acc_stderr,none": "N/A", "sample_len": 3}}
    assert list(metrics_of(results, {})) == [Metric("quiz", "acc", 1.0, None)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": 7}, "holds no results of tasks in format 1"),
        ({"format": 1}, "is damaged"),
        ({**harness_content(), "results": None}, "is damaged"),
        ([], "is damaged"),
    ],
)
def test_another_file_is_refused(content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "harness.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{message}.*ask the tasks again with megatron_dllm.harness"):
        read_task_results(tmp_path / "harness.json")

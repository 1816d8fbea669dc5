"""What is written of a step and of a validation, and which steps are written at all."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tiny_run import run_config
from megatron_dllm.checkpoint.validation import Validation
from megatron_dllm.diffusion.block_schedule import BlockSchedule
from megatron_dllm.diffusion.losses.step_sums import NUM_BUCKETS, StepSums
from megatron_dllm.model.pipeline import EmbeddingNoise
from megatron_dllm.training.observers.metrics import MetricsWriter, step_record
from megatron_dllm.training.observers.metrics_file import read_metrics, trim_metrics
from megatron_dllm.training.reports import StepReport, ValidationReport
from megatron_dllm.training.step import StepResult
from tests.unit.checkpoint.small_checkpoint import CONDITIONS


def sums_of(buckets: dict[int, tuple[float, float, float]], **extra: float) -> StepSums:
    """A step whose buckets hold (nll, count, correct); twice as many tokens could have carried a loss."""
    table = torch.zeros(NUM_BUCKETS, 3, dtype=torch.float64)
    for index, row in buckets.items():
        table[index] = torch.tensor(row)
    nll, count, correct = table.sum(0)
    named = {name: torch.tensor(value, dtype=torch.float64) for name, value in extra.items()}
    return StepSums(3 * nll, nll, correct, count, 2 * count, 2 * count, table, named)


def report_of(is_logged: bool, **changes: Any) -> StepReport:
    config = run_config(Path("unused"), "run")
    stage = BlockSchedule.from_config(config.schedule).stages[1]
    result = StepResult(sums_of({0: (6.0, 4.0, 1.0), 9: (2.0, 4.0, 3.0)}), grad_norm=0.5, is_applied=True)
    report = StepReport(stage, 6, 1000, 1e-3, result, EmbeddingNoise(), [], 80, 120, {}, 2.0, is_logged)
    return replace(report, **changes)


def test_the_record_of_a_step_by_hand() -> None:
    result = StepResult(sums_of({0: (6.0, 4.0, 1.0), 9: (2.0, 4.0, 3.0)}, entropy=8.0), 0.5, is_applied=True)
    assert step_record(result) == {
        "loss": 24 / 16,
        "masked_nll": 1.0,
        "masked_accuracy": 0.5,
        "masked_fraction": 0.5,
        "grad_norm": 0.5,
        "nll_t/0.0-0.1": 1.5,
        "accuracy_t/0.0-0.1": 0.25,
        "nll_t/0.9-1.0": 0.5,
        "accuracy_t/0.9-1.0": 0.75,
        "entropy": 8 / 16,
    }


def test_targets_a_second_are_those_of_both_losses(tmp_path: Path) -> None:
    """8 of the diffusion loss and 12 of the AR loss beside it, in 2 seconds."""
    writer = MetricsWriter(tmp_path, run_config(tmp_path, "run"), "disabled")
    report = report_of(is_logged=True)
    guided = report.result.sums.with_ratios(ar_loss=(torch.tensor(30.0), torch.tensor(12)))
    for sums in (report.result.sums, guided):
        writer.after_step(replace(report, result=replace(report.result, sums=sums)), {})
    writer.close()
    plain, both = read_metrics(tmp_path)
    assert (plain["targets_per_second"], both["targets_per_second"], both["ar_loss"]) == (4.0, 10.0, 2.5)
    assert both["masked_nll"] == plain["masked_nll"]


def test_means_per_noise_level_have_their_own_number() -> None:
    """Unlike other sums of an objective; a level in which there is nothing to divide by is left out."""
    table = torch.zeros(NUM_BUCKETS, 2, dtype=torch.float64)
    table[3], table[9] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    sums = sums_of({3: (6.0, 8.0, 4.0)}).with_level_means({"entropy_right_t": table})
    record = step_record(StepResult(sums, 0.5, is_applied=True))
    assert {name: value for name, value in record.items() if name.startswith("entropy")} == {
        "entropy_right_t/0.3-0.4": 0.75,
        "entropy_right_t/0.9-1.0": 0.0,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = MetricsWriter(tmp_path, run_config(tmp_path, "run"), "disabled")
    writer.after_step(report_of(is_logged=False), {})
    writer.after_step(report_of(is_logged=True), {"data_fingerprint": "abc"})
    validation = Validation({"32": 2.0}, target_block_size=32, conditions=CONDITIONS)
    writer.after_validation(ValidationReport(report_of(True).stage, 7, 1000, True, validation))
    writer.close()
    return tmp_path


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_steps_that_are_logged_and_validations_are_written(folder: Path) -> None:
    step, validation = read(folder)
    assert (step["step"], step["stage"], step["consumed_tokens"]) == (7, "stable", 1000)
    assert (step["data_fingerprint"], step["tokens_per_second"], step["step_seconds"]) == ("abc", 40.0, 2.0)
    assert step["loss"] == step["loss_block/32"] == 1.5
    assert validation == {
        "step": 7,
        "validation": True,
        "stage": "stable",
        "consumed_tokens": 1000,
        "is_stage_end": True,
        "validation_elbo/32": 2.0,
        "conditions": asdict(CONDITIONS),
    }


@pytest.mark.parametrize(("step", "is_validated", "left"), [(7, True, 2), (7, False, 1), (6, True, 0)])
def test_what_lies_behind_the_checkpoint_is_cut_off(folder: Path, step: int, is_validated: bool, left: int) -> None:
    assert trim_metrics(folder, step, is_validated) == (left < 2)
    assert len(read(folder)) == left


def test_a_line_that_a_killed_process_left_is_passed_over(folder: Path) -> None:
    expected = read(folder)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "text": "a\u2028b"}\n[]\n{"loss": 1}\n{"step": 8, "lo')
    found = read_metrics(folder)
    assert found[:2] == expected and found[2]["text"] == "a\u2028b" and len(found) == 3
    assert not trim_metrics(folder, 7)
    assert read_metrics(folder) == found and (folder / "metrics.jsonl").read_bytes().endswith(b"}\n")

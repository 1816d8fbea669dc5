"""What a run says of itself where nobody looks at a terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.tiny_run import run_config
from megatron_dllm.diffusion.block_schedule import BlockSchedule
from megatron_dllm.training.observers import progress
from megatron_dllm.training.observers.progress import Progress
from megatron_dllm.training.reports import StepReport, ValidationReport

NUM_STEPS = 36_000


@pytest.fixture
def schedule(tmp_path: Path) -> BlockSchedule:
    return BlockSchedule.from_config(run_config(tmp_path, "run").schedule)


def step_report(schedule: BlockSchedule, consumed: int, step: int) -> StepReport:
    result: Any = SimpleNamespace(loss=1.5)
    noise: Any = None
    stage = schedule.stage_at(consumed - 1)
    return StepReport(stage, step, consumed, 1e-3, result, noise, [], 10, 20, {}, 0.5, True)


def test_a_log_tells_the_story_in_few_lines(
    schedule: BlockSchedule, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred hours of ten seconds a step, with a checkpoint and a validation in the middle."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    observer, total = Progress(schedule), schedule.total_tokens
    for step in range(NUM_STEPS):
        clock.now += 10.0
        observer.after_step(step_report(schedule, 1 + step * total // NUM_STEPS, step), {})
        if step == NUM_STEPS // 2:
            observer.before_save(step)
            observer.after_save(Path("runs/x [y]/checkpoints/step_0018000"))
            validation: Any = SimpleNamespace(nats_per_token={"32": 2.25, "ar": 2.0})
            observer.before_validation(schedule.stages[1])
            observer.after_validation(ValidationReport(schedule.stages[1], step, 1, True, validation))
    observer.close()
    lines = capsys.readouterr().out.splitlines()
    assert 105 < len(lines) < 220
    stages = [line for line in lines if line.startswith("stage ")]
    assert [line.split()[1] for line in stages] == ["warmup:", "stable:", "decay:"]
    assert "block_diffusion, block 4, until 900 document tokens" in stages[0]
    assert "checkpoint runs/x [y]/checkpoints/step_0018000" in lines
    found = f"validation after step {NUM_STEPS // 2} (stable), ELBO in nats per token: block 32 2.2500, ar 2.0000"
    assert found in lines


def test_a_fast_run_says_a_line_every_quarter_of_a_minute(
    schedule: BlockSchedule, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    observer = Progress(replace(schedule, stages=schedule.stages[:1]))
    for step in range(61):
        observer.after_step(step_report(schedule, 10 * (step + 1), step), {})
        clock.now += 1.0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "tok/s" in line]) == 5

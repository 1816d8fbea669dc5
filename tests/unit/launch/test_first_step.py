from __future__ import annotations

import os
import time
from pathlib import Path

from launch.first_step import FirstStep


def write_steps(run: Path, *steps: int, age: float = 0.0) -> None:
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    os.utime(run / "metrics.jsonl", times=(time.time() - age,) * 2)


def test_a_first_start_s_first_step_has_no_pause(tmp_path: Path) -> None:
    first = FirstStep(tmp_path)
    assert first.look() is None
    write_steps(tmp_path, 1, age=-1.0)
    found = first.look()
    assert found is not None and found["pause"] is None and 0.5 < found["seconds"] < 5
    assert first.look() is None


def test_the_pause_runs_from_the_last_step_before_to_the_first_one_after(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_0000004\n")
    write_steps(tmp_path, 1, 2, 3, 4, 5, age=30.0)
    first = FirstStep(tmp_path)
    assert first.look() is None
    write_steps(tmp_path, 1, 2, 3, 4, age=-1.0)
    assert first.look() is None, "lines taken away are no step"
    write_steps(tmp_path, 1, 2, 3, 4, 5, age=-1.0)
    found = first.look()
    assert found is not None and 30 < found["pause"] < 35

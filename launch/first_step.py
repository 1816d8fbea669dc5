"""When an attempt at a run took its first step, told from the run's metrics: what an interruption has cost.

Standard library only: the job's supervisor asks.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from launch.record import last_lines, latest_checkpoint


def last_written(path: Path) -> float | None:
    """When a file was written last, in seconds of the epoch; None where there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


class FirstStep:
    """Made before the ranks of an attempt start; finds the first step that they log, once."""

    def __init__(self, run_folder: Path) -> None:
        self._metrics = run_folder / "metrics.jsonl"
        self._began = time.time()
        # The last step of the attempt before, whatever ended it.
        self._last_step = last_written(self._metrics)
        name = latest_checkpoint(run_folder)
        self._resumed = int(name.rpartition("_")[2]) if name else 0
        self._is_found = False

    def look(self) -> dict[str, Any] | None:
        """What to write down when the first step is there; None before and after.

        Returns:
            `seconds` since the ranks were started, and `pause`: seconds without a step since the last attempt, if any.
        """
        written = last_written(self._metrics)
        # An attempt that resumes first takes the lines behind its checkpoint away: that is no step.
        if self._is_found or written is None or written < self._began or self._step() <= self._resumed:
            return None
        self._is_found = True
        pause = None if self._last_step is None else round(written - self._last_step, 1)
        return {"seconds": round(written - self._began, 1), "pause": pause}

    def _step(self) -> int:
        try:
            return int(json.loads(last_lines(self._metrics, 1)[0])["step"])
        except (IndexError, ValueError, KeyError):
            return 0

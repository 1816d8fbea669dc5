"""metrics.jsonl: one record a line, written as a run goes on, cut back where it continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dllm.run.files import read_json_lines, write_text
from megatron_dllm.run.names import METRICS

Record = dict[str, Any]
# Of every pipeline rank (`training.observers.step_timing`): such a name, a slash and the rank.
PARTS_OF_RANKS = ("micro_batch_seconds", "waiting_seconds", "gradient_seconds", "update_seconds", "peak_memory_gib")
_OF_STEPS = ("tokens_per_second", "forward_tokens_per_second", "targets_per_second", "step_seconds", "peak_memory_gib")


def depends_on_machine(name: str) -> bool:
    """Whether a number of a record tells of clock and machine, not of the training."""
    return name.partition("/")[0] in (*_OF_STEPS, *PARTS_OF_RANKS)


def read_metrics(run_folder: Path) -> list[Record]:
    """The records of a run, none without a file; a line that a killed process left half-written is passed over."""
    return [record for record in read_json_lines(run_folder / METRICS) if isinstance(record.get("step"), int)]


def trim_metrics(run_folder: Path, step: int, is_validated: bool = True) -> bool:
    """Drop records behind `step`, and its validation unless the checkpoint has it: a resumed run writes them again.

    Returns:
        Whether any were dropped.
    """
    records = read_metrics(run_folder)
    kept = [r for r in records if r["step"] < step or (r["step"] == step and (is_validated or "validation" not in r))]
    if (run_folder / METRICS).is_file():
        write_text(run_folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
    return len(kept) < len(records)


def numbers_of(record: Record) -> dict[str, float]:
    """What of a record can be drawn as a curve."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }

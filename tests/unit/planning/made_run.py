"""A run's folder as far as a calibration reads it."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from tests.unit.config.configs import train_config


def write_run(folder: Path) -> None:
    """A folder of five steps of one stage, the last three of them on four ranks."""
    config = train_config()
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    starts = [{"step": 0, "world_size": 2}, {"step": 5, "world_size": 4}]
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    steps = [
        {
            "step": step,
            "stage": "one",
            "step_seconds": seconds,
            "tokens_per_second": 3200 / seconds,
            "targets_per_second": 1600 / seconds,
            "micro_batch_seconds/0": seconds / 2,
            "peak_memory_gib/0": 1.5,
        }
        for step, seconds in ((1, 90.0), (2, 80.0), (6, 2.0), (7, 3.0), (8, 4.0))
    ]
    records = [*steps, {"step": 8, "validation": True, "stage": "one"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

"""Run and chain folders as a training run leaves them, without a training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def training_record(step: int, **others: Any) -> dict[str, Any]:
    """A logged step, as training.observers.metrics writes it."""
    return {
        "step": step,
        "stage": "stable",
        "block_size": 32,
        "consumed_tokens": 1000 * step,
        "learning_rate": 1e-3,
        "loss": 5.0 - 0.01 * step,
        "grad_norm": 1.0,
        "nll_t/0.1-0.2": 4.0,
        "nll_t/0.8-0.9": 6.0,
        "tokens_per_second": 100.0,
        "forward_tokens_per_second": 190.0,
        "peak_memory_gib": 0.5,
        "router_imbalance/masked": 2.0,
        "router_load": [[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]],
        **others,
    }


def validation_record(step: int, elbo: float, is_stage_end: bool = True, stage: str = "stable") -> dict[str, Any]:
    """A validation at block 32."""
    return {
        "step": step,
        "validation": True,
        "stage": stage,
        "consumed_tokens": 1000 * step,
        "is_stage_end": is_stage_end,
        "validation_elbo/32": elbo,
        "validation_bits_per_byte/32": elbo / 2,
    }


def write_run(folder: Path, records: list[dict[str, Any]], load: str | None = None, time: float = 1.7e9) -> Path:
    """A run folder with metrics, configuration, commit and one start."""
    (folder / "lease").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "run": {"root": folder.parent.name, "name": folder.name, "seed": 7},
        "model": {"family": "bailing_moe", "num_layers": 4},
        "data": {"train": "corpus/train"},
        "checkpoint": {"load": load},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "git.txt").write_text(f"{COMMIT}\n")
    (folder / "lease" / "generation_000001").write_text(json.dumps({"owner": "node7:123", "time": time}) + "\n")
    return folder


def write_chain(folder: Path) -> Path:
    """A chain of warmup, stable and decay, whose names do not sort in that order."""
    loads = {"warmup": "start", "stable": "chains/full/warmup", "decay": "chains/full/stable/checkpoints/step_0000008"}
    for index, (name, load) in enumerate(loads.items()):
        records = [validation_record(0, 6.0 - index, stage=name)]
        records += [training_record(step, stage=name, block_size=4 << index) for step in (4, 8)]
        records += [validation_record(8, 5.0 - index, stage=name)]
        write_run(folder / name, records, load, 1.7e9 + index)
        job = folder / "launch" / name
        job.mkdir(parents=True)
        events = [{"time": 1.7e9 + index, "event": "start"}, {"time": 1.8e9, "event": "end", "seconds": 60.0 + index}]
        (job / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        arguments = ["-m", "megatron_dllm.train", "experiment=x"]
        (job / "job.json").write_text(json.dumps({"arguments": arguments, "nodes": 2, "ranks_per_node": 8}))
    return folder

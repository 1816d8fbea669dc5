"""A run that an earlier version left half-way, kept as files: `python -m tests.golden.earlier_run` wrote it once.

`earlier_run/` holds its checkpoint and, in `steps.txt`, what the rest of the run came to then. It must load as long as
the checkpoint's format number stays what it is, and must not be written anew for a change that cannot read it.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import (
    CONTEXT_LENGTH,
    MODEL,
    ROW_LENGTH,
    checkpoints_of,
    read_metrics,
    run_config,
    train_here,
    write_corpus,
)
from megatron_dllm.config import CheckpointConfig, ParallelConfig, ScheduleConfig, TrainConfig
from tests.golden.golden_run import STAGES, machine

FOLDER = Path(__file__).with_name("earlier_run")
NAME, CHECKPOINT, STEPS = "earlier", "step_0000007", "steps.txt"
SMALL = replace(
    MODEL,
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=32,
    kv_channels=4,
    num_moe_experts=4,
    moe_ffn_hidden_size=8,
    moe_shared_expert_intermediate_size=8,
    moe_router_topk=4,
    moe_router_num_groups=2,
    moe_router_group_topk=2,
)


def earlier_config(folder: Path) -> TrainConfig:
    """The run, in a folder that holds the corpus."""
    config = run_config(
        folder,
        NAME,
        ParallelConfig(),
        model=SMALL,
        checkpoint=CheckpointConfig(keep_last=9, save_interval_tokens=250, timeout_minutes=10.0),
        schedule=ScheduleConfig(context_length=CONTEXT_LENGTH, row_length=ROW_LENGTH, stages=dict(STAGES)),
    )
    # One chunk for the whole run: the saved position then holds rows under several geometries.
    return replace(config, data=replace(config.data, packing_chunk=400))


def steps_of(config: TrainConfig, first: int) -> list[str]:
    """Steps from `first` on, as the lines of `steps.txt`."""
    return [
        f"{r['step']} {r['stage']} {r['loss']!r} {r['grad_norm']!r} {r['data_fingerprint']}"
        for r in read_metrics(config)
        if "loss" in r and r["step"] >= first
    ]


def main() -> None:
    """Train the whole run, and keep its checkpoint from the middle of a stage."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "corpus")
        config = earlier_config(folder)
        assert run_ranks(train_here, 1, config, timeout_s=500.0) == [0]
        names = sorted(path.name for path in checkpoints_of(config).glob("step_*"))
        print(names)
        shutil.copytree(checkpoints_of(config) / CHECKPOINT, FOLDER / CHECKPOINT)
        lines = [machine(), *steps_of(config, int(CHECKPOINT.removeprefix("step_")) + 1)]
        (FOLDER / STEPS).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

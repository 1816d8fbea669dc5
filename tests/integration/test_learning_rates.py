"""A table of learning rates on ranks: what it holds still stands still, also where the run changes its layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.tiny_run import (
    STAGES,
    checkpoints_of,
    read_metrics,
    read_tensors,
    run_config,
    train_ranks,
    write_corpus,
)
from megatron_dllm.config import CheckpointConfig, OptimizerConfig, ParallelConfig, ScheduleConfig, TrainConfig
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED

TABLE = {"*.mlp.experts.*": 0.3, "*.router.*": 0.0, "decoder.layers.1.self_attention.*": 0.0}
OTHER = ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1)
NOISE = dict(order_bias=1.0, t_density="bell", t_max_start=0.3, t_max_ramp_share=0.5)


def _config(folder: Path, name: str) -> TrainConfig:
    schedule = run_config(folder, name).schedule
    stage = replace(STAGES["warmup"], lr_warmup_tokens=0, **NOISE)
    return run_config(
        folder,
        name,
        schedule=ScheduleConfig(schedule.context_length, schedule.row_length, {"only": stage}),
        optimizer=OptimizerConfig(adam_eps=1e-3, lr_multipliers=TABLE),
        checkpoint=CheckpointConfig(save_interval_tokens=1, keep_last=9, timeout_minutes=10.0),
    )


def _weights(config: TrainConfig, which: int) -> dict[str, torch.Tensor]:
    folder = sorted(checkpoints_of(config).glob("step_*"))[which]
    return {name: value for name, value in read_tensors(folder).items() if not name.startswith("optimizer")}


def test_a_table_holds_through_a_stop_and_in_another_layout(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    unbroken, moved = _config(tmp_path, "unbroken"), _config(tmp_path, "moved")
    assert train_ranks(1, unbroken) == [0]
    assert train_ranks(1, moved, 3) == [EXIT_PREEMPTED]
    assert train_ranks(2, replace(moved, parallel=OTHER)) == [0, 0]
    first, last, expected = _weights(moved, 0), _weights(moved, -1), _weights(unbroken, -1)
    still = {name for name in last if ".router.weight" in name or name.startswith("decoder.layers.1.self_attention.")}
    assert len(still) > 4
    for name, value in last.items():
        if not name.endswith("expert_bias"):  # which follows the load, not a gradient
            assert torch.equal(value, first[name]) == (name in still), name
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    for record, reference in zip(read_metrics(moved), read_metrics(unbroken), strict=True):
        assert record["data_fingerprint"] == reference["data_fingerprint"]
        assert record["loss"] == pytest.approx(reference["loss"], rel=1e-5)

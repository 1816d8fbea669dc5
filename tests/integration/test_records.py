"""After a kill, what a run has recorded is the same everywhere: metrics.jsonl, TensorBoard and W&B."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import STAGES, checkpoints_of, read_metrics, run_config, train_here, train_ranks, write_corpus
from megatron_dllm.config import EvaluationConfig, LoggingConfig, TrainConfig
from tests.unit.training.observers.test_curves import drawn_in_tensorboard
from tests.wandb_file import history


def _config(folder: Path, name: str, wandb_mode: str) -> TrainConfig:
    config = run_config(folder, name)
    return replace(
        config,
        logging=LoggingConfig(interval_steps=1, tensorboard=True, wandb_mode=wandb_mode),
        schedule=replace(config.schedule, stages={"warmup": replace(STAGES["warmup"], num_tokens=1500)}),
        evaluation=EvaluationConfig(block_sizes=[4], num_tokens=300, micro_batch_size=4),
        data=replace(config.data, validation=config.data.train),
    )


def test_all_records_agree_after_a_kill(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    config = _config(tmp_path, "killed", "offline")
    with pytest.raises(RuntimeError):  # some steps after the first checkpoint
        run_ranks(train_here, 1, config, 7, signal.SIGKILL, timeout_s=300.0)
    killed = read_metrics(config)
    assert train_ranks(1, config) == [0]
    records = read_metrics(config)
    step = killed[-1]["step"]
    expected = _config(tmp_path, "unbroken", "disabled")
    assert train_ranks(1, expected) == [0]
    assert records == read_metrics(expected)
    assert any("validation" in record for record in records) and 1 < step < records[-1]["step"]

    run = checkpoints_of(config).parent
    drawn = drawn_in_tensorboard(run)
    newest = max((run / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    rows = history(newest)
    for name in ("loss", "grad_norm", "consumed_tokens", "validation_elbo/4"):
        values = [(record["step"], record[name]) for record in records if name in record]
        assert drawn[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in values], name
        assert [(row["step"], row[name]) for row in rows if name in row] == list(dict(values).items()), name

"""Alignment in training: every layout trains what one rank trains, and weight 0 trains what no alignment trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny_run import STAGES, read_steps, run_config, train_ranks, write_corpus
from megatron_dllm.config import (
    AlignmentConfig,
    CheckpointConfig,
    ParallelConfig,
    TeacherConfig,
    TrainConfig,
    TrainingConfig,
)

STAGE = replace(STAGES["warmup"], num_tokens=400, lr_warmup_tokens=0)
LAYOUTS = {
    "CP2": (2, ParallelConfig(context_parallel_size=2)),
    "TP2": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2)),
    "PP2 recomputed": (2, ParallelConfig(pipeline_model_parallel_size=2, recompute="full")),
    "interleaved": (2, ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "EP2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "CP2 TP2": (4, ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True)),
}


# Without a second model, each way to divide once.
CLEAN_LAYOUTS = ("PP2 recomputed", "interleaved", "EP2", "CP2 TP2")
TAUGHT_LAYOUTS = ("CP2", "TP2", "PP2 recomputed", "interleaved")


def config_of(
    folder: Path, name: str, weight: float, layout: ParallelConfig | None = None, source: str = "clean"
) -> TrainConfig:
    load = str(folder / "runs" / "start") if name not in ("start", "ar") else None
    config = run_config(
        folder,
        name.replace(" ", "_"),
        layout,
        training=TrainingConfig(),
        teacher=TeacherConfig(str(folder / "runs" / "ar") if source == "teacher" else None),
        checkpoint=CheckpointConfig(keep_last=1, timeout_minutes=10.0, load=load),
    )
    stage = replace(STAGE, alignment=AlignmentConfig(weight, source))
    if name == "ar":
        stage = replace(STAGE, objective="ar", block_size=1)
    return replace(config, schedule=replace(config.schedule, stages={"warmup": stage}))


@pytest.fixture(scope="module")
def one_rank_run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("alignment")
    write_corpus(folder / "corpus", 60)
    for name, weight in (("start", 0.0), ("one", 2.0)):
        config = config_of(folder, name, weight)
        assert train_ranks(1, config) == [0]
    return config


def test_noisy_tokens_come_closer_to_clean_ones(one_rank_run: TrainConfig) -> None:
    folder = Path(one_rank_run.run.root).parent
    without = config_of(folder, "without", 0.0)
    assert train_ranks(1, without) == [0]
    steps, plain = read_steps(one_rank_run), read_steps(without)
    assert steps[0]["loss"] == plain[0]["loss"] and steps[0]["grad_norm"] != plain[0]["grad_norm"]
    assert not any("alignment" in name for name in plain[0])
    for step in steps:
        assert 0.0 < step["alignment_visible"] < 2.0 and 0.0 < step["alignment_masked"] < 2.0
        assert 0.0 < step["alignment_loss"] < 2.0 * (step["alignment_visible"] + step["alignment_masked"])
    assert steps[-1]["alignment_masked"] < steps[0]["alignment_masked"]


def _train_layout(name: str, expected: TrainConfig, source: str = "clean") -> None:
    """Train a layout, and compare its first steps with those of one rank."""
    num_ranks, layout = LAYOUTS[name]
    config = config_of(Path(expected.run.root).parent, f"{name} {source}", 2.0, layout, source)
    assert train_ranks(num_ranks, config) == [0] * num_ranks
    found, steps = read_steps(config), read_steps(expected)
    assert len(found) == len(steps) >= 2
    for key in ("loss", "grad_norm", "alignment_loss", "alignment_visible", "alignment_masked"):
        assert found[0][key] == pytest.approx(steps[0][key], rel=1e-5), key
        assert found[1][key] == pytest.approx(steps[1][key], rel=1e-4), key


@pytest.mark.parametrize("name", CLEAN_LAYOUTS)
def test_a_layout_trains_what_one_rank_trains(name: str, one_rank_run: TrainConfig) -> None:
    _train_layout(name, one_rank_run)


@pytest.fixture(scope="module")
def taught_run(one_rank_run: TrainConfig) -> TrainConfig:
    """One rank, taught by an AR model of other weights."""
    folder = Path(one_rank_run.run.root).parent
    assert train_ranks(1, config_of(folder, "ar", 0.0)) == [0]
    config = config_of(folder, "taught", 2.0, source="teacher")
    assert train_ranks(1, config) == [0]
    return config


@pytest.mark.parametrize("name", TAUGHT_LAYOUTS)
def test_a_layout_that_a_second_model_teaches_trains_what_one_rank_trains(name: str, taught_run: TrainConfig) -> None:
    _train_layout(name, taught_run, "teacher")

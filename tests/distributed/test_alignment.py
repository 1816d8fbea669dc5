"""Alignment in training: every layout trains what one rank trains, and weight 0 trains what no alignment trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny_run import STAGES, read_steps, run_config, train_ranks, write_corpus
from megatron_dllm.config import AlignmentConfig, CheckpointConfig, ParallelConfig, TrainConfig, TrainingConfig

STAGE = replace(STAGES["warmup"], num_tokens=400, lr_warmup_tokens=0)
LAYOUTS = {
    "DP2": (2, ParallelConfig()),
    "CP2": (2, ParallelConfig(context_parallel_size=2)),
    "TP2": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2)),
    "PP2 recomputed": (2, ParallelConfig(pipeline_model_parallel_size=2, recompute="full")),
    "interleaved": (2, ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "EP2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "CP2 TP2": (4, ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True)),
}


def config_of(folder: Path, name: str, weight: float, layout: ParallelConfig | None = None) -> TrainConfig:
    load = str(folder / "runs" / "start") if name != "start" else None
    config = run_config(
        folder,
        name.replace(" ", "_"),
        layout,
        training=TrainingConfig(),
        checkpoint=CheckpointConfig(keep_last=1, timeout_minutes=10.0, load=load),
    )
    stage = replace(STAGE, alignment=AlignmentConfig(weight=weight))
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


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_what_one_rank_trains(name: str, one_rank_run: TrainConfig) -> None:
    num_ranks, layout = LAYOUTS[name]
    config = config_of(Path(one_rank_run.run.root).parent, name, 2.0, layout)
    assert train_ranks(num_ranks, config) == [0] * num_ranks
    found, expected = read_steps(config), read_steps(one_rank_run)
    assert len(found) == len(expected) >= 2
    for key in ("loss", "grad_norm", "alignment_loss", "alignment_visible", "alignment_masked"):
        assert found[0][key] == pytest.approx(expected[0][key], rel=1e-5), key
        assert found[1][key] == pytest.approx(expected[1][key], rel=1e-4), key

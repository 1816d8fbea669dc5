"""Training on chats: a layout trains what one rank trains, and a run that is stopped in an epoch goes on with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from benchmarks.tiny_chats import write_chats
from benchmarks.tiny_run import (
    STAGES,
    TRAINING,
    checkpoints_of,
    read_metrics,
    read_steps,
    read_tensors,
    run_config,
    train_here,
    train_ranks,
)
from megatron_dllm.checkpoint.validation import Validation, read_validation
from megatron_dllm.config import CapConfig, CheckpointConfig, EvaluationConfig, ParallelConfig, SftConfig, TrainConfig
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED
from megatron_dllm.run.names import METRICS

# Two passes over 60 chats in steps of 4 rows: the second step that one epoch ends in is in the middle of one.
STAGE = replace(
    STAGES["decay"],
    num_tokens=None,
    num_epochs=2.0,
    loss_weight="uniform",
    t_min=0.2,
    t_max=0.8,
    sft=SftConfig(),
    cap=CapConfig(coefficient=1.0),
)
LAYOUTS = {
    "CP2": ParallelConfig(context_parallel_size=2),
    "TP2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "EP2": ParallelConfig(expert_model_parallel_size=2),
}


def config_of(folder: Path, name: str, layout: ParallelConfig | None = None) -> TrainConfig:
    config = run_config(
        folder,
        name,
        layout,
        training=replace(TRAINING, mask_embedding_noise=0.0),
        checkpoint=CheckpointConfig(
            keep_last=1, timeout_minutes=10.0, load=None if name == "start" else str(folder / "runs" / "start")
        ),
    )
    schedule = replace(config.schedule, row_length=160, stages={"sft": STAGE})
    data = replace(config.data, packing_chunk=16, validation=str(folder / "corpus"))
    evaluation = EvaluationConfig(block_sizes=[STAGE.block_size], num_tokens=300)
    return replace(config, schedule=schedule, data=data, evaluation=evaluation)


@pytest.fixture(scope="module")
def one_rank_run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "corpus", 60)
    for name in ("start", "one"):
        config = config_of(folder, name)
        assert train_ranks(1, config) == [0]
    return config


def test_the_supervised_tokens_of_a_second_are_logged(one_rank_run: TrainConfig) -> None:
    lines = (Path(one_rank_run.run.root) / one_rank_run.run.name / METRICS).read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    assert records and all(0 < record["targets_per_second"] < record["forward_tokens_per_second"] for record in records)


def test_the_metrics_of_chats(one_rank_run: TrainConfig) -> None:
    steps = read_steps(one_rank_run)
    assert len(steps) >= 6
    for step in steps:
        assert 0.2 < step["fill_share"] < 0.8
        assert step["masked_fraction"] == 0.5, "a pair masks every token once"
        assert step["confidence_loss"] > 0


def _measure(checkpoint: Path, words: list[str]) -> Validation:
    from megatron_dllm.evaluate import compose_words, measure

    return measure(compose_words([f"checkpoint={checkpoint}", *words])).validation


def test_a_checkpoint_is_measured_as_its_run_has_measured_it(one_rank_run: TrainConfig, tmp_path: Path) -> None:
    """The chats in the rows of their training, with the fill: the checkpoint says how that was."""
    checkpoint = max(checkpoints_of(one_rank_run).glob("step_*"))
    words = [
        f"data.validation={one_rank_run.data.validation}",
        "evaluation.num_tokens=300",
        f"output={tmp_path}/x.json",
    ]
    (found,) = run_ranks(_measure, 1, checkpoint, [*words, "schedule.row_length=160"], timeout_s=300.0)
    expected = read_validation(checkpoint)
    assert expected is not None and expected.conditions is not None
    assert expected.conditions.blocks == "document, fill eos, turns split_views"
    assert found.difference(expected) == ""
    assert found.nats_per_token["8"] == pytest.approx(expected.nats_per_token["8"], rel=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_what_one_rank_trains(name: str, one_rank_run: TrainConfig) -> None:
    folder = Path(one_rank_run.run.root).parent
    config = config_of(folder, name, LAYOUTS[name])
    assert train_ranks(2, config) == [0, 0]
    found, expected = read_steps(config), read_steps(one_rank_run)
    assert len(found) == len(expected)
    for key in ("loss", "grad_norm", "masked_nll", "fill_share", "consumed_tokens", "confidence_loss"):
        assert found[0][key] == pytest.approx(expected[0][key], rel=1e-5), key
        assert found[-1][key] == pytest.approx(expected[-1][key], rel=1e-3), key
    assert [step["data_fingerprint"] for step in found] == [step["data_fingerprint"] for step in expected]
    measured, by_one_rank = (
        [record["validation_elbo/8"] for record in read_metrics(c) if "validation" in record]
        for c in (config, one_rank_run)
    )
    assert measured == pytest.approx(by_one_rank, rel=1e-3) and len(measured) == 2


def test_a_run_that_is_stopped_in_an_epoch_ends_with_the_same_bits(one_rank_run: TrainConfig) -> None:
    config = config_of(Path(one_rank_run.run.root).parent, "stopped")
    assert run_ranks(train_here, 1, config, 4, timeout_s=500.0) == [EXIT_PREEMPTED]
    assert train_ranks(1, config) == [0]
    found, expected = (read_tensors(max(checkpoints_of(c).glob("step_*"))) for c in (config, one_rank_run))
    assert found.keys() == expected.keys()
    assert all(bool((found[name] == tensor).all()) for name, tensor in expected.items())
    assert [step["loss"] for step in read_steps(config)] == [step["loss"] for step in read_steps(one_rank_run)]

"""A run that is stopped, moved and continued ends with the weights of one that never was."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_dllm import checkpoint_folder as folders
from megatron_dllm.config import CheckpointConfig, EvaluationConfig, ParallelConfig, TrainConfig
from megatron_dllm.exit_codes import EXIT_LAYOUT, EXIT_PREEMPTED
from tests.tiny_run import STAGES, checkpoints_of, read_metrics, read_tensors, run_config, train_ranks, write_corpus

TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2)
TP2_EP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2,
                         expert_tensor_parallel_size=1)
PP2_VIRTUAL = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
CP2 = ParallelConfig(context_parallel_size=2)
PP2_EP2 = ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    write_corpus(path / "corpus")
    return path


@pytest.fixture(scope="module")
def unbroken_two(folder: Path) -> TrainConfig:
    config = run_config(folder, "unbroken_two")
    assert train_ranks(2, config) == [0, 0]
    return config


@pytest.fixture(scope="module")
def unbroken_one(folder: Path) -> TrainConfig:
    config = run_config(folder, "unbroken_one")
    assert train_ranks(1, config) == [0]
    return config


def _last(config: TrainConfig) -> dict[str, torch.Tensor]:
    return read_tensors(max(checkpoints_of(config).glob("step_*")))


def _assert_equal(config: TrainConfig, expected: TrainConfig) -> None:
    tensors, expected_tensors = _last(config), _last(expected)
    assert tensors.keys() == expected_tensors.keys()
    different = [key for key, tensor in tensors.items() if not torch.equal(tensor, expected_tensors[key])]
    assert not different
    assert read_metrics(config) == read_metrics(expected)


def _assert_close(config: TrainConfig, expected: TrainConfig, tolerance: float = 1e-5) -> None:
    tensors, expected_tensors = _last(config), _last(expected)
    assert tensors.keys() == expected_tensors.keys()
    errors = {key: float((tensor - expected_tensors[key]).double().norm() / expected_tensors[key].double().norm())
              for key, tensor in tensors.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tolerance, (worst, errors[worst])
    for record, reference in zip(read_metrics(config), read_metrics(expected), strict=True):
        for name in ("step", "consumed_tokens", "data_fingerprint", "stage"):
            assert record[name] == reference[name]
        assert record["loss"] == pytest.approx(reference["loss"], rel=tolerance)
        assert record["grad_norm"] == pytest.approx(reference["grad_norm"], rel=10 * tolerance)


def _steps_of_stages(config: TrainConfig) -> list[int]:
    stages = [record["stage"] for record in read_metrics(config)]
    return [stages.count(name) for name in STAGES]


@pytest.mark.parametrize("is_async", [False, True])
def test_stops_and_starts_change_nothing(folder: Path, unbroken_two: TrainConfig, is_async: bool) -> None:
    """Stopped in the first stage, exactly at its end, and inside a chunk of the second."""
    config = run_config(folder, f"stopped_{is_async}",
                        checkpoint=CheckpointConfig(save_interval_tokens=600, is_async=is_async, timeout_minutes=10.0))
    first, second, _ = _steps_of_stages(unbroken_two)
    assert first > 3 and second > 3, "the stops must lie inside the stages"
    for steps, number in ((3, signal.SIGTERM), (first - 3, signal.SIGUSR1), (2, signal.SIGTERM)):
        assert train_ranks(2, config, steps, number) == [EXIT_PREEMPTED] * 2
    assert read_metrics(config)[-1]["step"] == first + 2
    assert train_ranks(2, config) == [0, 0]
    _assert_equal(config, unbroken_two)


def test_a_run_moves_through_all_layouts(folder: Path, unbroken_one: TrainConfig) -> None:
    """Two steps in each: TP, TP x EP, virtual pipeline, CP, PP x EP, data parallel; then one rank to the end."""
    config = run_config(folder, "moving")
    assert train_ranks(1, config, 2) == [EXIT_PREEMPTED]
    for layout, ranks in ((TP2, 2), (PP2_VIRTUAL, 2), (TP2_EP2, 2), (CP2, 2), (PP2_EP2, 4), (ParallelConfig(), 2)):
        moved = replace(config, parallel=layout)
        assert train_ranks(ranks, moved, 2) == [EXIT_PREEMPTED] * ranks
    assert train_ranks(1, config) == [0]
    _assert_close(config, unbroken_one)


def test_a_checkpoint_is_evaluated_that_was_not_before_the_run_ended(folder: Path, unbroken_one: TrainConfig) -> None:
    config = run_config(folder, "evaluated", evaluation=EvaluationConfig(block_sizes=[8], num_tokens=500))
    config = replace(config, data=replace(config.data, validation=config.data.train))
    first = _steps_of_stages(unbroken_one)[0]
    assert train_ranks(1, config, first) == [EXIT_PREEMPTED]
    validation = folders.step_folder(checkpoints_of(config), first) / folders.VALIDATION
    expected, records = validation.read_text(), read_metrics(config)
    validation.unlink()
    metrics = checkpoints_of(config).parent / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert train_ranks(1, config, 1) == [EXIT_PREEMPTED]
    assert validation.read_text() == expected
    assert read_metrics(config)[:len(records)] == records
    assert records[-1]["validation"]


def test_a_stage_has_its_own_layout(folder: Path, unbroken_one: TrainConfig) -> None:
    stages = {**STAGES, "stable": replace(STAGES["stable"], parallel=TP2, world_size=2),
              "decay": replace(STAGES["decay"], world_size=1)}
    stages["warmup"] = replace(stages["warmup"], world_size=1)
    config = run_config(folder, "staged")
    config = replace(config, schedule=replace(config.schedule, stages=stages))
    assert train_ranks(1, config) == [EXIT_LAYOUT]
    with pytest.raises(RuntimeError, match=r"stages.stable.world_size \(2\) differs from the number of ranks \(1\)"):
        train_ranks(1, config)
    assert train_ranks(2, config) == [EXIT_LAYOUT] * 2
    assert train_ranks(1, config) == [0]
    _assert_close(config, unbroken_one)


def test_layouts_of_all_stages_are_checked_at_the_start(folder: Path) -> None:
    config = run_config(folder, "refused")
    stages = {**STAGES, "decay": replace(STAGES["decay"], parallel=ParallelConfig(tensor_model_parallel_size=3))}
    config = replace(config, schedule=replace(config.schedule, stages=stages))
    with pytest.raises(ValueError, match=r"stages.decay, on 4 ranks: .*must divide the number of ranks \(4\)"):
        config.validate(4)
    with pytest.raises(ValueError, match=r"stages.decay.parallel.precision \(bf16\) must be the run's"):
        stages["decay"] = replace(STAGES["decay"], parallel=ParallelConfig(precision="bf16"))
        config.validate(1)

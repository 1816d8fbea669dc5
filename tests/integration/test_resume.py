"""A run that is stopped, moved and continued ends with the weights of one that never was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import (
    STAGES,
    checkpoints_of,
    read_metrics,
    read_tensors,
    run_config,
    train_ranks,
    write_corpus,
)
from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.meta import read_meta
from megatron_dllm.config import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from megatron_dllm.run.exit_codes import EXIT_LAYOUT, EXIT_PREEMPTED
from megatron_dllm.run.names import CONFIG, METRICS, STARTS, STATE, VALIDATION

TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2)
TP2_EP2 = ParallelConfig(
    tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2, expert_tensor_parallel_size=1
)
PP2_VIRTUAL = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
CP2 = ParallelConfig(context_parallel_size=2)
PP2_EP2 = ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)

KEEP_ALL = CheckpointConfig(save_interval_tokens=600, keep_last=9, timeout_minutes=10.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    write_corpus(path / "corpus")
    return path


@pytest.fixture(scope="module")
def unbroken_two(folder: Path) -> TrainConfig:
    config = _evaluated(run_config(folder, "unbroken_two"))
    assert train_ranks(2, config) == [0, 0]
    return config


@pytest.fixture(scope="module")
def unbroken_one(folder: Path) -> TrainConfig:
    config = run_config(folder, "unbroken_one", checkpoint=KEEP_ALL)
    assert train_ranks(1, config) == [0]
    return config


def _evaluated(config: TrainConfig) -> TrainConfig:
    """With a validation at every checkpoint."""
    return replace(
        config,
        evaluation=EvaluationConfig(block_sizes=[8], num_tokens=300, micro_batch_size=4),
        data=replace(config.data, validation=config.data.train),
    )


def _last(config: TrainConfig) -> dict[str, torch.Tensor]:
    return read_tensors(max(checkpoints_of(config).glob("step_*")))


def _assert_equal(config: TrainConfig, expected: TrainConfig) -> None:
    tensors, expected_tensors = _last(config), _last(expected)
    assert tensors.keys() == expected_tensors.keys()
    different = [key for key, tensor in tensors.items() if not torch.equal(tensor, expected_tensors[key])]
    assert not different
    if config.logging == expected.logging:
        assert read_metrics(config) == read_metrics(expected)
    for name in ("loss", "grad_norm", "mask_embedding_norm", "router_load", "validation_elbo/8"):
        values, expected_values = (
            {record["step"]: record[name] for record in read_metrics(run) if name in record}
            for run in (config, expected)
        )
        assert values.items() <= expected_values.items(), name


def _assert_close(config: TrainConfig, expected: TrainConfig, tolerance: float = 1e-5) -> None:
    tensors, expected_tensors = _last(config), _last(expected)
    assert tensors.keys() == expected_tensors.keys()
    errors = {
        key: float((tensor - expected_tensors[key]).double().norm() / expected_tensors[key].double().norm())
        for key, tensor in tensors.items()
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tolerance, (worst, errors[worst])
    for record, reference in zip(read_metrics(config), read_metrics(expected), strict=True):
        for name in ("step", "consumed_tokens", "data_fingerprint", "stage"):
            assert record[name] == reference[name]
        assert record["loss"] == pytest.approx(reference["loss"], rel=tolerance)
        assert record["grad_norm"] == pytest.approx(reference["grad_norm"], rel=10 * tolerance)


def _steps_of_stages(config: TrainConfig) -> list[int]:
    stages = [record["stage"] for record in read_metrics(config) if "validation" not in record]
    return [stages.count(name) for name in STAGES]


def test_a_stage_with_an_ar_loss_continues_exactly(folder: Path) -> None:
    """Clean copies in blocks of one, half of their tokens as AR targets, and AR rows: stopped within the stage."""
    guided = replace(STAGES["warmup"], clean_block_size=1, ar_weight=0.5, ar_share=0.5, ar_row_share=0.25)
    unbroken, stopped = (
        replace(config, schedule=replace(config.schedule, stages={"warmup": guided}))
        for config in (run_config(folder, "guided_unbroken"), run_config(folder, "guided_stopped"))
    )
    assert train_ranks(1, unbroken) == [0]
    assert train_ranks(1, stopped, 3) == [EXIT_PREEMPTED] and train_ranks(1, stopped) == [0]
    _assert_equal(stopped, unbroken)
    records = read_metrics(unbroken)
    assert all({"diffusion_loss", "ar_loss", "data_share/corpus.ar"} <= set(record) for record in records)
    for record in records:
        assert record["loss"] == pytest.approx(record["diffusion_loss"] + 0.5 * record["ar_loss"], rel=0.2)


@pytest.mark.parametrize("is_overlapping", [False, True], ids=["plain", "async saves, overlapping collectives"])
def test_stops_and_starts_change_nothing(folder: Path, unbroken_two: TrainConfig, is_overlapping: bool) -> None:
    """Stopped in the first stage, exactly at its end, and inside a chunk of the second; by a signal to either rank."""
    config = _evaluated(
        run_config(
            folder,
            f"stopped_{is_overlapping}",
            checkpoint=CheckpointConfig(save_interval_tokens=600, is_async=is_overlapping, timeout_minutes=10.0),
            optimizer=OptimizerConfig(
                adam_eps=1e-3, overlap_grad_reduce=is_overlapping, overlap_param_gather=is_overlapping
            ),
            logging=LoggingConfig(interval_steps=1 + is_overlapping, tensorboard=False),
        )
    )  # a record gathers weights too
    first, second, _ = _steps_of_stages(unbroken_two)
    assert first > 3 and second > 3, "the stops must lie inside the stages"
    for steps, number, rank in ((3, signal.SIGTERM, 1), (first - 3, signal.SIGUSR1, 0), (2, signal.SIGINT, 1)):
        assert train_ranks(2, config, steps, number, rank) == [EXIT_PREEMPTED] * 2
    assert folders.latest_checkpoint(checkpoints_of(config)) == folders.step_folder(checkpoints_of(config), first + 2)
    assert train_ranks(2, config) == [0, 0]
    _assert_equal(config, unbroken_two)


def _begin_with(config: TrainConfig, other: TrainConfig, after: int) -> None:
    """Give a run the first checkpoint that another one wrote after so many steps."""
    start = next(path for path in folders.step_folders(checkpoints_of(other)) if read_meta(path).position.step > after)
    shutil.copytree(start, checkpoints_of(config) / start.name)
    shutil.copy(checkpoints_of(other).parent / "metrics.jsonl", checkpoints_of(config).parent)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [pytest.param(PP2_VIRTUAL, id="PP2 virtual"), pytest.param(TP2_EP2, id="TP2 EP2")])
def test_a_model_parallel_run_equals_one_rank_and_itself(
    folder: Path, unbroken_one: TrainConfig, layout: ParallelConfig
) -> None:
    """Through all stages: against one rank, and continued from a checkpoint inside the second."""
    name = f"parallel_{layout.pipeline_model_parallel_size}"
    unbroken, config = (run_config(folder, name, layout, checkpoint=KEEP_ALL) for name in (name, f"{name}_continued"))
    _begin_with(unbroken, unbroken_one, after=0)  # random weights differ between layouts
    assert train_ranks(2, unbroken) == [0, 0]
    _assert_close(unbroken, unbroken_one)
    _begin_with(config, unbroken, after=_steps_of_stages(unbroken)[0])
    assert train_ranks(2, config) == [0, 0]
    _assert_equal(config, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_bf16_run_continues_with_its_fp32_weights_past_an_altered_description(folder: Path, offload: str) -> None:
    layout, optimizer = ParallelConfig(precision="bf16"), OptimizerConfig(adam_eps=1e-3, offload=offload)
    unbroken, config = (
        run_config(folder, f"{name}_{offload}", layout, checkpoint=KEEP_ALL, optimizer=optimizer)
        for name in ("bf16", "bf16_continued")
    )
    assert train_ranks(2, unbroken) == [0, 0]
    first, second, _ = _steps_of_stages(unbroken)
    for after in (first, first + second):
        _begin_with(config, unbroken, after)
    state = max(checkpoints_of(config).glob("step_*")) / STATE
    state.write_text(state.read_text().replace(":", ";", 1))
    assert train_ranks(2, config) == [0, 0]
    assert (state.parent.with_name(f"damaged-{state.parent.name}")).is_dir()
    _assert_equal(config, unbroken)
    tensors = _last(config)
    assert tensors["output_layer.weight"].dtype == torch.bfloat16
    assert tensors["optimizer.state.param.output_layer.weight"].dtype == torch.float32


@pytest.mark.slow
def test_a_run_moves_through_all_layouts(folder: Path, unbroken_one: TrainConfig) -> None:
    """Two steps in each: TP, TP x EP, virtual pipeline, CP, PP x EP, data parallel; then one rank to the end."""
    config = run_config(folder, "moving")
    assert train_ranks(1, config, 2) == [EXIT_PREEMPTED]
    for layout, ranks in ((TP2, 2), (PP2_VIRTUAL, 2), (TP2_EP2, 2), (CP2, 2), (PP2_EP2, 4), (ParallelConfig(), 2)):
        moved = replace(config, parallel=layout)
        assert train_ranks(ranks, moved, 2) == [EXIT_PREEMPTED] * ranks
    assert train_ranks(1, config) == [0]
    _assert_close(config, unbroken_one)


@pytest.mark.slow
def test_a_run_takes_its_optimizer_to_the_host_and_back(folder: Path, unbroken_one: TrainConfig) -> None:
    config = run_config(folder, "offloaded")
    on_host = replace(config, optimizer=replace(config.optimizer, offload="cpu", offload_fraction=0.7))
    assert train_ranks(1, config, 2) == [EXIT_PREEMPTED]
    assert train_ranks(2, on_host, 3) == [EXIT_PREEMPTED] * 2
    assert train_ranks(1, config) == [0]
    _assert_close(config, unbroken_one)


@pytest.mark.slow  # compiles DeepSpeed's kernel
def test_a_run_with_deepspeeds_adam_is_the_one_with_torchs(folder: Path, unbroken_one: TrainConfig) -> None:
    """From its beginning to its second stage, then with torch's on the device, and back to the end."""
    pytest.importorskip("deepspeed", reason="NOT RUN: needs the package deepspeed")
    of_torch = run_config(folder, "deepspeed", checkpoint=KEEP_ALL)
    config = replace(of_torch, optimizer=replace(of_torch.optimizer, offload="cpu", offload_adam="deepspeed"))
    assert train_ranks(1, config, _steps_of_stages(unbroken_one)[0] + 1) == [EXIT_PREEMPTED]
    assert train_ranks(1, of_torch, 2) == [EXIT_PREEMPTED]
    assert train_ranks(1, config) == [0]
    _assert_close(config, unbroken_one)


def _train_stopped_in_validation(config: TrainConfig) -> int:
    from megatron_dllm.train import train
    from megatron_dllm.training.observers.observer import Observer
    from megatron_dllm.training.parts import Parts

    class Interruption(Observer):
        def before_validation(self, stage: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    return train(config, lambda: Parts(extra_observers=[Interruption()]))


def test_a_run_that_is_asked_to_stop_leaves_the_validation_to_its_next_start(folder: Path) -> None:
    unbroken, config = (_evaluated(run_config(folder, name)) for name in ("evaluated", "evaluated_later"))
    assert train_ranks(1, unbroken, 6) == [EXIT_PREEMPTED]
    expected = read_metrics(unbroken)
    (step,) = [record["step"] for record in expected if "validation" in record and record["is_stage_end"]]
    assert train_ranks(1, config, step) == [EXIT_PREEMPTED]
    validation = folders.step_folder(checkpoints_of(config), step) / VALIDATION
    assert read_metrics(config)[-1] == next(record for record in expected if record["step"] == step)
    assert run_ranks(_train_stopped_in_validation, 1, config, timeout_s=500.0) == [EXIT_PREEMPTED]
    assert not validation.exists()
    with open(checkpoints_of(config).parent / "metrics.jsonl", "a") as metrics:  # killed before it wrote that file
        (record,) = [record for record in expected if "validation" in record and record["step"] == step]
        metrics.write(json.dumps(record) + "\n")
    assert train_ranks(1, config, 6 - step) == [EXIT_PREEMPTED]
    assert read_metrics(config) == expected
    assert validation.read_text() == (folders.step_folder(checkpoints_of(unbroken), step) / VALIDATION).read_text()


def test_a_stage_has_its_own_layout(folder: Path, unbroken_one: TrainConfig) -> None:
    stages = {
        **STAGES,
        "stable": replace(STAGES["stable"], parallel=TP2, world_size=2),
        "decay": replace(STAGES["decay"], world_size=1),
    }
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


def test_validations_that_cannot_run_are_refused_at_the_start(folder: Path, unbroken_one: TrainConfig) -> None:
    from megatron_dllm.training.sources import Sources
    from megatron_dllm.training.start import decide_start

    config = _evaluated(run_config(folder, "unmeasured"))
    schedule = ScheduleConfig(context_length=32, row_length=32, stages={"stable": STAGES["stable"]})  # no clean copies
    with pytest.raises(ValueError, match=r"validation \(8\) cannot run: row_length \(32\) must hold"):
        decide_start(replace(config, schedule=schedule), 1, Sources(config))
    measured = replace(config, schedule=schedule, evaluation=replace(config.evaluation, block_sizes=[32]))
    assert decide_start(measured, 1, Sources(measured)).resume is None


def test_a_refused_start_leaves_the_configuration_of_the_run(unbroken_one: TrainConfig) -> None:
    path = checkpoints_of(unbroken_one).parent / "config.yaml"
    expected = path.read_text()
    stages = {**STAGES, "decay": replace(STAGES["decay"], block_size=4)}
    with pytest.raises(RuntimeError, match=r"stages.decay: block_size \(4\) differs .*the run's own schedule"):
        train_ranks(1, replace(unbroken_one, schedule=replace(unbroken_one.schedule, stages=stages)))
    assert path.read_text() == expected


def test_a_finished_run_trains_nothing_and_keeps_its_past(unbroken_one: TrainConfig) -> None:
    run = checkpoints_of(unbroken_one).parent
    expected = [(run / name).read_text() for name in (CONFIG, METRICS)]
    stages = {**STAGES, "decay": replace(STAGES["decay"], learning_rate=1e-5)}
    changed = replace(unbroken_one, schedule=replace(unbroken_one.schedule, stages=stages))
    assert train_ranks(1, changed) == [0]
    assert [(run / name).read_text() for name in (CONFIG, METRICS)] == expected
    starts = [json.loads(line) for line in (run / STARTS).read_text().splitlines()]
    assert [start["is_finished"] for start in starts] == [False, True]
    assert starts[1]["changes"] == {"schedule.stages.decay.learning_rate": [3e-3, 1e-5]}


def test_a_changed_value_is_recorded_beside_the_earlier_one(folder: Path) -> None:
    config = run_config(folder, "changed")
    assert train_ranks(1, config, 2) == [EXIT_PREEMPTED]
    run = checkpoints_of(config).parent
    before = (run / CONFIG).read_text()
    assert train_ranks(1, replace(config, logging=replace(config.logging, interval_steps=2)), 2) == [EXIT_PREEMPTED]
    assert (run / "config_0001.yaml").read_text() == before != (run / CONFIG).read_text()
    first, second = (json.loads(line) for line in (run / STARTS).read_text().splitlines())
    assert (first["step"], first["changes"]) == (0, {})
    assert (second["step"], second["changes"]) == (2, {"logging.interval_steps": [1, 2]})


def _train_on_slow_rows(config: TrainConfig) -> int:
    from megatron_dllm.data.corpus import Corpus
    from megatron_dllm.train import train
    from megatron_dllm.training.parts import Parts

    class SlowCorpus(Corpus):
        """At least one document is read for every row."""

        def read(self, document: int, offset: int, length: int) -> Any:
            time.sleep(0.1)
            return super().read(document, offset, length)

    return train(config, lambda: Parts(open_source=lambda prefix, config: SlowCorpus(prefix, config.model)))


def test_the_time_of_a_step_counts_its_rows(folder: Path) -> None:
    config = run_config(folder, "slow_rows")
    config = replace(config, schedule=replace(config.schedule, stages={"warmup": STAGES["warmup"]}))
    assert run_ranks(_train_on_slow_rows, 1, config, timeout_s=500.0) == [0]
    lines = (checkpoints_of(config).parent / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step_seconds"] >= 0.1 * STAGES["warmup"].global_batch_size for line in lines)

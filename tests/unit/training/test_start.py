"""What a start decides from a configuration and what lies on disk, without a process group."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny_run import STAGES, run_config, write_corpus
from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.config import CheckpointConfig, EvaluationConfig, ParallelConfig, TrainConfig
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.run.names import CONFIG
from megatron_dllm.training.past import as_yaml
from megatron_dllm.training.sources import Sources
from megatron_dllm.training.start import Start, decide_start
from tests.distributed.test_start import write_checkpoint

TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    write_corpus(tmp_path / "corpus")
    return run_config(tmp_path, "run")


def decide(config: TrainConfig, world_size: int | None = 1) -> Start:
    return decide_start(config, world_size, Sources(config))


def with_stage(config: TrainConfig, name: str, **changes: object) -> TrainConfig:
    stages = {**config.schedule.stages, name: replace(config.schedule.stages[name], **changes)}
    return replace(config, schedule=replace(config.schedule, stages=stages))


def test_a_new_run(config: TrainConfig) -> None:
    start = decide(config)
    assert (start.resume, start.weights, start.passed_over, start.warnings) == (None, None, {}, ())
    assert [stage.name for stage in start.schedule.stages] == list(STAGES)
    assert start.layout == config.parallel
    assert start.num_corpus_tokens == Sources(config).train.num_tokens
    assert all(row.steps is not None and row.steps > 3 for row in start.table)


def test_a_run_continues_with_its_newest_checkpoint_in_the_layout_of_its_stage(config: TrainConfig) -> None:
    config = with_stage(config, "warmup", parallel=TP2)
    write_checkpoint(config, 3)
    start = decide(config, 2)
    assert start.resume is not None and start.resume.folder.name == "step_0000003"
    assert (start.resume.state.step, start.resume.state.consumed_tokens) == (3, 300)
    assert start.layout == TP2
    assert start.weights is None


def test_a_damaged_checkpoint_is_passed_over_with_the_reason(config: TrainConfig) -> None:
    folder = write_checkpoint(config, 3)
    newer = folders.step_folder(folder.parent, 5)
    newer.mkdir()
    start = decide(config)
    assert start.resume is not None and start.resume.folder == folder
    assert list(start.passed_over) == [newer] and "manifest.json is missing" in start.passed_over[newer]
    with pytest.raises(
        ValueError, match=r"all of \['step_0000003', 'step_0000005'\] are damaged \(cut short; .*missing"
    ):
        decide_start(config, 1, Sources(config), {folder: "cut short"})


def test_a_stage_wants_its_number_of_ranks(config: TrainConfig) -> None:
    for name in STAGES:
        config = with_stage(config, name, world_size=2)
    with pytest.raises(ValueError, match=r"stages.warmup.world_size \(2\) differs from the number of ranks \(1\)"):
        decide(config, 1)
    assert decide(config, 2).layout == decide(config, None).layout


def test_a_run_is_not_started_anew_over_its_checkpoints(config: TrainConfig) -> None:
    write_checkpoint(config, 3)
    with pytest.raises(ValueError, match=r"checkpoint.resume \(false\) starts anew, but run.name \(run\)"):
        decide(replace(config, checkpoint=CheckpointConfig(resume=False)))


def test_a_position_in_other_rows_is_refused(config: TrainConfig) -> None:
    write_checkpoint(config, 3)
    with pytest.raises(ValueError, match=r"seed \(5\) differs from the saved data position's \(1234\)"):
        decide(replace(config, run=replace(config.run, seed=5)))


def test_a_stage_that_is_over_stays_as_it_was(config: TrainConfig) -> None:
    folder = write_checkpoint(config, 3)
    now = with_stage(config, "warmup", block_size=8)
    (folder.parents[1] / CONFIG).write_text(as_yaml(config))
    with pytest.raises(ValueError, match=r"warmup: block_size \(8\) differs from the checkpoint"):
        decide(now)
    assert decide(config).changes == ()
    longer = with_stage(config, "warmup", num_tokens=1000)
    assert [str(change) for change in decide(longer).changes] == ["schedule.stages.warmup.num_tokens: 900 -> 1000"]
    with pytest.raises(ValueError, match=r"warmup lies between 0 and 300 tokens, the checkpoint"):
        decide(
            with_stage(config, "warmup", num_tokens=300, global_batch_size=1, micro_batch_size=1, lr_warmup_tokens=0)
        )


def test_settings_without_effect_are_told_with_the_decision(config: TrainConfig) -> None:
    start = decide(with_stage(config, "warmup", final_learning_rate=1e-5))
    assert len(start.warnings) == 1 and "schedule.stages.warmup.final_learning_rate" in start.warnings[0]


def test_each_corpus_is_opened_once(config: TrainConfig) -> None:
    config = replace(
        config,
        data=replace(config.data, validation=config.data.train),
        evaluation=EvaluationConfig(block_sizes=[8, 32], num_tokens=300),
    )
    opened: Counter[str] = Counter()

    def open_counted(prefix: str, config: TrainConfig) -> Corpus:
        opened[prefix] += 1
        return Corpus(prefix, config.model)

    sources = Sources(config, open_counted)
    decide_start(config, 1, sources)
    assert sources.validation is not None and sources.train.num_tokens > 0
    assert opened == {config.data.train: 2}, "once to train, once to validate"

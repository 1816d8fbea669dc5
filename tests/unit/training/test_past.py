"""What of a schedule may still be changed once a part of it has been trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.tiny_run import STAGES, run_config
from megatron_dllm.checkpoint.meta import Position
from megatron_dllm.config import StageConfig, TrainConfig
from megatron_dllm.diffusion.block_schedule import BlockSchedule
from megatron_dllm.training.past import as_yaml, changes_since, check_place, check_trained, read_past

Stages = dict[str, StageConfig]
# 900 tokens of warmup, 1800 of stable, 900 of decay.
IN_STABLE = Position(step=9, consumed_tokens=1500, stage="stable")
END_OF_STABLE = Position(step=12, consumed_tokens=2750, stage="stable", is_stage_end=True)
FINISHED = Position(step=18, consumed_tokens=3610, stage="decay", is_stage_end=True)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return run_config(tmp_path, "run")


def with_stages(config: TrainConfig, stages: Stages) -> TrainConfig:
    return replace(config, schedule=replace(config.schedule, stages=stages))


def check(past: TrainConfig, now: TrainConfig, position: Position) -> None:
    schedule = BlockSchedule.from_config(now.schedule)
    check_place(schedule, position, Path("step_9"))
    check_trained(yaml.safe_load(as_yaml(past)), schedule, position)


def changed(stage: str, **values: object) -> Callable[[Stages], Stages]:
    return lambda stages: {**stages, stage: replace(stages[stage], **values)}


def without(stage: str) -> Callable[[Stages], Stages]:
    return lambda stages: {name: value for name, value in stages.items() if name != stage}


def renamed(stages: Stages) -> Stages:
    return {{"warmup": "heating"}.get(name, name): value for name, value in stages.items()}


def swapped(stages: Stages) -> Stages:
    return {name: stages[name] for name in ("decay", "warmup", "stable")}


def longer_twice(stages: Stages) -> Stages:
    """The stage under way stays where the checkpoint is, but what was warmup has become another length."""
    return changed("stable", num_tokens=1900)(changed("warmup", num_tokens=1000)(stages))


@pytest.mark.parametrize(
    ("change", "position", "message"),
    [
        (changed("warmup", num_tokens=4000), IN_STABLE, "stable lies between 4000 and 5800 tokens, the checkpoint"),
        (changed("warmup", num_tokens=1000), IN_STABLE, r"warmup.num_tokens \(1000\) was 900 .* which is over"),
        (longer_twice, IN_STABLE, r"warmup.num_tokens \(1000\) was 900"),
        (changed("warmup", block_size=8), IN_STABLE, r"warmup.block_size \(8\) was 4"),
        (changed("warmup", objective="ar", block_size=1), IN_STABLE, r"warmup.objective \(ar\) was block_diffusion"),
        (changed("stable", num_tokens=600), IN_STABLE, "lies between 900 and 1500 tokens"),
        (without("warmup"), IN_STABLE, "has stable where the run was trained in warmup"),
        (renamed, IN_STABLE, "has heating where the run was trained in warmup"),
        (swapped, IN_STABLE, "stable lies between 1800 and 3600"),
        (changed("stable", num_tokens=1900), END_OF_STABLE, r"stable.num_tokens \(1900\) was 1800"),
        (changed("stable", num_tokens=1700), END_OF_STABLE, r"stable.num_tokens \(1700\) was 1800"),
        (changed("stable", num_tokens=3000), FINISHED, "decay lies between 3900"),
        (changed("decay", num_tokens=800), FINISHED, "may only be made longer"),
        (changed("decay", block_size=16), FINISHED, r"decay.block_size \(16\) was 8"),
    ],
)
def test_what_was_trained_cannot_become_another_thing(
    config: TrainConfig, change: Callable[[Stages], Stages], position: Position, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        check(config, with_stages(config, change(STAGES)), position)
    assert "start a new run from the weights" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "position"),
    [
        (dict, IN_STABLE),
        (dict, FINISHED),
        (changed("stable", num_tokens=5000), IN_STABLE),
        (changed("stable", num_tokens=700), IN_STABLE),
        (changed("decay", num_tokens=5000), FINISHED),
        (changed("decay", num_tokens=500, block_size=16), END_OF_STABLE),
        (without("decay"), IN_STABLE),
        (lambda stages: {**stages, "more": stages["decay"]}, FINISHED),
        (changed("warmup", learning_rate=1.0, micro_batch_size=2), IN_STABLE),
    ],
)
def test_what_lies_ahead_may_change(
    config: TrainConfig, change: Callable[[Stages], Stages], position: Position
) -> None:
    check(config, with_stages(config, change(STAGES)), position)


def test_a_checkpoint_brought_from_another_run_is_compared_by_its_place_alone(config: TrainConfig) -> None:
    other = with_stages(config, {"direct": STAGES["decay"]})
    check(other, config, IN_STABLE)
    check(config, other, Position())


def test_every_change_is_told_with_both_values(config: TrainConfig, tmp_path: Path) -> None:
    assert read_past(tmp_path) is None and changes_since(None, config) == ()
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    past = read_past(tmp_path)
    assert changes_since(past, config) == ()
    now = with_stages(config, changed("decay", learning_rate=1e-5)(STAGES))
    assert [str(change) for change in changes_since(past, now)] == [
        "schedule.stages.decay.learning_rate: 0.003 -> 1e-05"
    ]


@pytest.mark.parametrize("text", ["a: [", "- a\n", "a: !!python/object:os.system x\n"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml is damaged .*; restore it"):
        read_past(tmp_path)


@pytest.mark.parametrize("epochs", [1.0, 2.0, 3.0])
def test_a_stage_in_epochs_that_is_over_may_only_be_made_longer(config: TrainConfig, epochs: float) -> None:
    def in_epochs(number: float) -> TrainConfig:
        return with_stages(config, {"decay": replace(STAGES["decay"], num_tokens=None, num_epochs=number)})

    finished = Position(step=18, consumed_tokens=2010, stage="decay", is_stage_end=True)
    past = yaml.safe_load(as_yaml(in_epochs(2.0)))
    schedule = BlockSchedule.from_config(in_epochs(epochs).schedule, {"decay": 1000})
    if epochs >= 2.0:
        check_trained(past, schedule, finished)
        return
    with pytest.raises(ValueError, match=r"decay.num_epochs \(1.0\) was 2.0 .* may only be made longer"):
        check_trained(past, schedule, finished)

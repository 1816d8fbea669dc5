"""Whether a run may continue in this configuration: what it has trained so far cannot be made another thing now.

A stage that is over keeps its name, place, length, objective and block size; the one under way may end later, but not
before the place where the run stands. Anything else may change, and every change is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from megatron_dllm.checkpoint.meta import Position
from megatron_dllm.config import TrainConfig
from megatron_dllm.diffusion.block_schedule import BlockSchedule, Stage
from megatron_dllm.run.history import Change, changes_between
from megatron_dllm.run.names import CONFIG

_KEPT = ("objective", "block_size", "clean_block_size")
_REMEDY = "continue with the run's own schedule (its config.yaml), or start a new run from the weights"
_RESTORE = "restore it from a copy, or remove it if what the run was trained with does not matter"


def as_yaml(config: TrainConfig) -> str:
    """The configuration as config.yaml holds it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_past(run_folder: Path) -> dict[str, Any] | None:
    """The configuration of the run's newest start that trained, as plain tables; None for a new run.

    Raises:
        ValueError: config.yaml is damaged.
    """
    path = run_folder / CONFIG
    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); {_RESTORE}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no table of values); {_RESTORE}.")
    return content


def changes_since(past: Mapping[str, Any] | None, config: TrainConfig) -> tuple[Change, ...]:
    """What differs from the configuration of the start before."""
    return () if past is None else changes_between(past, yaml.safe_load(as_yaml(config)))


def check_place(schedule: BlockSchedule, position: Position, folder: Path) -> None:
    """Refuse a schedule that puts the checkpoint's tokens into another stage than the one it was trained in.

    Args:
        schedule: of this start.
        position: of the checkpoint.
        folder: of the checkpoint, for the message.

    Raises:
        ValueError: naming the stage, both places and the remedy.
    """
    own = next((stage for stage in schedule.stages if stage.name == position.stage), None)
    if own is None:  # a checkpoint without a stage; one whose stage is gone is refused before
        return
    consumed = position.consumed_tokens
    if consumed < own.start or (consumed >= own.end and not position.is_stage_end):
        raise ValueError(
            f"schedule.stages.{own.name} lies between {own.start} and {own.end} tokens, the checkpoint {folder} of "
            f"that stage at {consumed}: what has been trained keeps its length; {_REMEDY}."
        )


def check_trained(past: Mapping[str, Any], schedule: BlockSchedule, position: Position) -> None:
    """Refuse a schedule in which the stages that have been trained are other ones.

    Args:
        past: configuration of the start before.
        schedule: of this start.
        position: of the checkpoint that the run continues from.

    Raises:
        ValueError: naming the first stage that differs, both values and the remedy.
    """
    stages: dict[str, Any] = past.get("schedule", {}).get("stages", {})
    names = list(stages)
    if position.stage not in names:  # the checkpoint was brought here from another run
        return
    is_last = position.stage == names[-1]
    trained = names[: names.index(position.stage) + 1]
    for place, name in enumerate(trained):
        is_over = name != position.stage or (position.is_stage_end and not is_last)
        _check_stage(name, stages[name], _at(schedule.stages, place), is_over)
    if is_last and position.is_stage_end:
        _check_not_shorter(stages[names[-1]], schedule.stages[len(trained) - 1])


def _at(stages: Sequence[Stage], place: int) -> Stage | None:
    return stages[place] if place < len(stages) else None


def _check_stage(name: str, past: Mapping[str, Any], stage: Stage | None, is_over: bool) -> None:
    if stage is None or stage.name != name:
        now = "nothing" if stage is None else stage.name
        raise ValueError(
            f"schedule.stages has {now} where the run was trained in {name}: a stage that has been trained cannot be "
            f"removed or moved; {_REMEDY}."
        )
    for field in (*_KEPT, *(["num_tokens", "num_epochs"] if is_over else [])):
        was, now = past.get(field), getattr(stage.config, field)
        if was is not None and was != now:
            raise ValueError(
                f"schedule.stages.{name}.{field} ({now}) was {was} when the run was trained in this stage, which "
                f"{'is over' if is_over else 'is under way'}; {_REMEDY}."
            )


def _check_not_shorter(past: Mapping[str, Any], stage: Stage) -> None:
    for field in ("num_tokens", "num_epochs"):
        was, now = past.get(field), getattr(stage.config, field)
        if was is not None and now is not None and now < was:
            raise ValueError(
                f"schedule.stages.{stage.name}.{field} ({now}) was {was} when the run was trained, and this stage is "
                f"over: it may only be made longer; {_REMEDY}."
            )

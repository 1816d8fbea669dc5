"""How far a stage has come, told from its files: finished, begun, or new; and refusal to mix two configurations."""

from __future__ import annotations

from enum import Enum

from launch import record
from launch.chain import Chain, Stage


class Progress(Enum):
    """State of a stage before it is started."""

    NEW = "new"
    BEGUN = "continues"
    FINISHED = "finished"


def progress_of(chain: Chain, stage: Stage, allow_changes: bool = False) -> Progress:
    """The stage's state; a tool that was killed after it had renamed its output into place counts as finished.

    Args:
        chain: the chain.
        stage: one of its stages.
        allow_changes: continue a training stage whose configuration differs from the one that wrote its checkpoints.

    Raises:
        ValueError: the stage's results belong to another command or configuration.
    """
    folder = chain.stage_folder(stage)
    finished = record.done_digest(folder)
    if finished == stage.digest:
        return Progress.FINISHED
    remedy = f"choose another name= (it is {chain.config.name}), or remove {chain.folder}"
    if finished is not None:
        raise ValueError(
            f"stage {stage.name} has finished with another command or configuration, or a stage before it "
            f"has changed since; {remedy}."
        )
    starts = [event for event in record.events(folder) if event["event"] == "start"]
    is_same = bool(starts) and starts[-1].get("digest") == stage.digest
    if not stage.is_training:
        if not record.output_exists(stage.spec.output):
            return Progress.BEGUN if starts else Progress.NEW
        if not is_same:
            raise ValueError(
                f"stage {stage.name}: output ({stage.spec.output}) exists and was not written by this "
                f"command; {remedy}."
            )
        record.mark_done(folder, stage.digest)
        return Progress.FINISHED
    assert stage.run_folder is not None, "a training stage has a run folder"
    if record.latest_checkpoint(stage.run_folder) is None:
        return Progress.BEGUN if starts else Progress.NEW
    if starts and not is_same and not allow_changes:
        raise ValueError(
            f"stage {stage.name} holds checkpoints of another configuration in {stage.run_folder}; "
            f"{remedy}, or continue from them with --allow_changes."
        )
    return Progress.BEGUN

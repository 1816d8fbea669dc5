"""How far a job has come, told from its files: finished, begun, or new; and refusal to mix two configurations."""

from __future__ import annotations

from enum import Enum

from launch import record
from launch.jobs import Chain, Job


class Progress(Enum):
    """State of a job before it is started."""

    NEW = "new"
    BEGUN = "continues"
    FINISHED = "finished"


def progress_of(chain: Chain, job: Job, allow_changes: bool = False) -> Progress:
    """The job's state; a tool that was killed after it had renamed its output into place counts as finished.

    Args:
        chain: the chain.
        job: one of its jobs.
        allow_changes: continue a training job whose configuration differs from the one that wrote its checkpoints.

    Raises:
        ValueError: the job's results belong to another command or configuration.
    """
    folder = chain.job_folder(job)
    finished = record.done_digest(folder)
    if finished == job.digest:
        return Progress.FINISHED
    remedy = f"choose another name= (it is {chain.config.name}), or remove {chain.folder}"
    if finished is not None:
        raise ValueError(
            f"job {job.name} has finished with another command or configuration, or a job before it "
            f"has changed since; {remedy}."
        )
    attempts = [event for event in record.events(folder) if event["event"] == "start"]
    is_same = bool(attempts) and attempts[-1].get("digest") == job.digest
    if not job.is_training:
        if not record.output_exists(job.spec.output):
            return Progress.BEGUN if attempts else Progress.NEW
        if not is_same:
            raise ValueError(
                f"job {job.name}: output ({job.spec.output}) exists and was not written by this command; {remedy}."
            )
        record.mark_done(folder, job.digest)
        return Progress.FINISHED
    assert job.run_folder is not None, "a training job has a run folder"
    if record.latest_checkpoint(job.run_folder) is None:
        return Progress.BEGUN if attempts else Progress.NEW
    if attempts and not is_same and not allow_changes:
        raise ValueError(
            f"job {job.name} holds checkpoints of another configuration in {job.run_folder}; "
            f"{remedy}, or continue from them with --allow_changes."
        )
    return Progress.BEGUN

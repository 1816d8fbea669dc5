"""Run a step again that was skipped or that stopped the run, row by row, on one process.

    python -m megatron_dllm.replay RUN/replay/step_0000123 [--checkpoint DIR] [--rows 20]

Prints the rows that give a loss or gradient that is not finite, or else those with the largest gradients: their
sample ids, noise levels, share of loss and gradient, and the first module whose output was not finite. Weights are
those of the run's newest checkpoint at or before the step; where it is older than the step, that is said.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import logging
import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.identity import check_identity
from megatron_dllm.checkpoint.manifest import read_json
from megatron_dllm.checkpoint.meta import read_meta
from megatron_dllm.config import ParallelConfig, TrainConfig
from megatron_dllm.run.names import CHECKPOINTS
from megatron_dllm.run.place import require_one_process


def find_checkpoint(folder: Path, step: int, config: TrainConfig) -> Path:
    """The newest complete checkpoint of the run that is not younger than the step, else what the run started from.

    Raises:
        ValueError: there is neither.
    """
    checkpoints = folder.resolve().parents[1] / CHECKPOINTS
    earlier = [folder for folder in folders.list_checkpoints(checkpoints) if read_meta(folder).position.step <= step]
    if earlier:
        return earlier[-1]
    if config.checkpoint.load:
        return folders.resolve_checkpoint(Path(config.checkpoint.load))
    raise ValueError(f"{checkpoints} holds no checkpoint at or before step {step}; name one with --checkpoint.")


def replay(folder: Path, checkpoint: Path | None) -> tuple[dict[str, Any], Path, Any]:
    """Rebuild the model on this process and replay the step.

    Returns:
        What step.json says, the checkpoint used, and a `training.replay.StepReplay`.

    Raises:
        ValueError: no batch, or no checkpoint of its model.
    """
    require_one_process("replaying a step")
    record = read_json(folder / "step.json")
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), record["config"]))
    config.parallel = ParallelConfig(precision=config.parallel.precision)
    if record["stage"] in config.taught_stages:
        raise ValueError(
            f"stage {record['stage']} learns from teacher.checkpoint ({config.teacher.checkpoint}), and a replay has "
            "one model; set its alignment.weight and distill.weight to 0 in step.json to see what the NLL alone did."
        )
    checkpoint = checkpoint or find_checkpoint(folder, record["step"], config)
    check_identity(checkpoint, config.model)
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()

    from megatron_dllm.checkpoint.loading import load_weights
    from megatron_dllm.model.objective import objective_of
    from megatron_dllm.model.pipeline import EmbeddingNoise
    from megatron_dllm.parallel.device import local_device
    from megatron_dllm.parallel.groups import destroy, initialize
    from megatron_dllm.training.engine import build_chunks
    from megatron_dllm.training.replay import load_step, replay_step

    ranks = load_step(folder)
    groups = initialize(config.parallel, config.run)
    try:
        chunks = build_chunks(config, groups)
        load_weights(checkpoint, chunks, config.checkpoint.verify)
        device = local_device()
        # Records of earlier versions do not know the stage's steps, nor what follows from them.
        objective = objective_of(config.schedule.stages[record["stage"]], config.noise).at(record.get("stage_step", 0))
        noise = EmbeddingNoise(**record["embedding_noise"])
        return record, checkpoint, replay_step(chunks[0], ranks, objective, noise, device)
    finally:
        destroy()


def _age(folder: Path, checkpoint: Path, step: int) -> str:
    """Where the weights stand, seen from the step."""
    if checkpoint.resolve().parent != folder.resolve().parents[1] / CHECKPOINTS:
        return "not a checkpoint of this run"
    at = read_meta(checkpoint).position.step
    return f"step {at}" + (f", {abs(step - at)} steps {'before' if at < step else 'after'}" if at != step else "")


def _print(folder: Path, record: dict[str, Any], checkpoint: Path, result: Any, num_rows: int) -> None:
    console = Console(soft_wrap=True)
    console.print(f"step {record['step']} of stage {record['stage']}: {record['reason']}", highlight=False)
    console.print(f"weights of {checkpoint} ({_age(folder, checkpoint, record['step'])})", highlight=False)
    console.print(
        f"loss {result.loss:.6g} (in the run {record['loss']:.6g}), gradient norm {result.grad_norm:.6g} "
        f"(in the run {record['grad_norm']:.6g})",
        highlight=False,
    )
    bad = [row for row in result.rows if not math.isfinite(row.badness)]
    console.print(
        f"{len(bad)} of {len(result.rows)} rows are not finite"
        if bad
        else f"all {len(result.rows)} rows are finite; the largest gradients first",
        highlight=False,
    )
    table = Table("data rank", "micro batch", "row", "sample ids", "targets", "t", "loss", "gradient norm", "first bad")
    for row in result.rows[:num_rows]:
        samples = " ".join(str(sample) for sample in row.sample_ids[:6]) + (" ..." if len(row.sample_ids) > 6 else "")
        table.add_row(
            str(row.data_rank),
            str(row.micro_batch),
            str(row.row),
            samples,
            str(row.num_targets),
            f"{row.t_min:.3f}..{row.t_max:.3f}",
            f"{row.loss:.4g}",
            f"{row.grad_norm:.4g}",
            row.first_bad,
        )
    console.print(table)


def main(words: list[str] | None = None) -> int:
    """Parse the command line, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="RUN/replay/step_N")
    parser.add_argument("--checkpoint", type=Path, help="weights to use (default: the run's, at or before the step)")
    parser.add_argument("--rows", type=int, default=20, help="how many rows to print")
    arguments = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    record, checkpoint, result = replay(arguments.folder, arguments.checkpoint)
    _print(arguments.folder, record, checkpoint, result, arguments.rows)
    return 0


if __name__ == "__main__":
    run_command(main)

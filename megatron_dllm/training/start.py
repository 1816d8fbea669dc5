"""Where a run starts: what it reads, its newest whole checkpoint, the stage that comes next and its layout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.identity import check_identity, check_start
from megatron_dllm.checkpoint.loading import load_run, verify
from megatron_dllm.checkpoint.manifest import check_complete, read_json
from megatron_dllm.config import ParallelConfig, TrainConfig
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.diffusion.block_schedule import BlockSchedule, Stage
from megatron_dllm.evaluation.elbo import validation_geometry, validation_names
from megatron_dllm.model.objective import objective_of
from megatron_dllm.parallel.agreement import raise_together
from megatron_dllm.parallel.groups import start_process_group
from megatron_dllm.run.files import write_text
from megatron_dllm.run.lease import Lease, LeaseLost
from megatron_dllm.run.names import CHECKPOINTS, LATEST, STATE

log = logging.getLogger(__name__)


def run_checkpoints(config: TrainConfig) -> Path:
    """The folder of the run's checkpoints."""
    return Path(config.run.root) / config.run.name / CHECKPOINTS


def run_contract(config: TrainConfig) -> dict[str, Any]:
    """The part of the contract that may not change inside one run."""
    return {
        "block_origin": config.data.block_origin,
        "mask_token_id": config.model.mask_token_id,
        "context_length": config.schedule.context_length,
    }


def check_inputs(config: TrainConfig) -> None:
    """Open what the run reads, before a process group starts.

    Raises:
        ValueError: a corpus, tokenizer, schedule or start checkpoint that cannot work, saying why.
    """
    schedule = BlockSchedule.from_config(config.schedule)
    corpus = Corpus(config.data.train, config.model, config.data.tokenizer)
    for stage in schedule.stages:
        corpus.check_geometry(RowGeometry.of_stage(stage.config, config.schedule, config.data))
    if config.data.validation and config.evaluation.num_tokens:
        held_out = Corpus(config.data.validation, config.model, config.data.tokenizer)
        for name in dict.fromkeys(name for stage in schedule.stages for name in validation_names(config, stage.config)):
            try:
                held_out.check_geometry(validation_geometry(config, name))
            except ValueError as error:
                raise ValueError(f"validation ({name}) cannot run: {error}") from None
    has_checkpoints = bool(folders.step_folders(run_checkpoints(config)))
    if has_checkpoints and not config.checkpoint.resume:
        raise ValueError(
            f"checkpoint.resume (false) starts anew, but run.name ({config.run.name}) has checkpoints in "
            f"{run_checkpoints(config)}; choose another name, or remove them."
        )
    if config.checkpoint.load and not has_checkpoints:
        start = folders.resolve_checkpoint(Path(config.checkpoint.load))
        check_complete(start)
        check_start(start, config)


def _check_same_stage(folder: Path, stored: dict[str, Any], config: TrainConfig) -> None:
    """Refuse to continue in a schedule whose stage of that name is another one than the checkpoint was trained in."""
    name, contract = stored.get("stage"), stored["contract"]
    if name is None:
        return
    if name not in config.schedule.stages:
        raise ValueError(
            f"schedule.stages has no {name}, the stage of the checkpoint {folder}; continue with the "
            "run's own schedule (its config.yaml), or start a new run from the weights."
        )
    stage = config.schedule.stages[name]
    for field, value in (("shift", objective_of(stage, config.noise).shift), ("block_size", stage.block_size)):
        if contract.get(field, value) != value:
            raise ValueError(
                f"schedule.stages.{name}: {field} ({value}) differs from the checkpoint {folder} "
                f"({contract[field]}); continue with the run's own schedule (its config.yaml), or start "
                "a new run from the weights."
            )


def acquire_lease(run_folder: Path) -> Lease | None:
    """The right to write the run folder, on rank 0 (a collective).

    Raises:
        LeaseLost: on every rank, where a newer start of the run holds it.
    """
    lease: Lease | None = None
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            lease = Lease.acquire(run_folder)
        except (LeaseLost, OSError) as caught:
            error = caught
    raise_together(error)
    return lease


def next_stage(config: TrainConfig) -> Stage | None:
    """The stage that this start of the run begins with; None when the run has finished."""
    schedule = BlockSchedule.from_config(config.schedule)
    latest = folders.latest_checkpoint(run_checkpoints(config)) if config.checkpoint.resume else None
    consumed = read_json(latest / STATE)["consumed_tokens"] if latest else 0
    return None if schedule.is_finished(consumed) else schedule.stage_at(consumed)


def check_world_size(config: TrainConfig, world_size: int) -> None:
    """Refuse a start with another number of ranks than the next stage asks for.

    Raises:
        ValueError: naming the stage and both numbers.
    """
    stage = next_stage(config)
    wanted = stage.config.world_size if stage else None
    if stage is not None and wanted is not None and wanted != world_size:
        raise ValueError(
            f"schedule.stages.{stage.name}.world_size ({wanted}) differs from the number of ranks "
            f"({world_size}), and this stage is next; start {wanted} ranks."
        )


def choose_layout(config: TrainConfig) -> ParallelConfig:
    """The layout of the stage that comes next, as rank 0 sees the checkpoints (starts the process group)."""
    if all(stage.parallel is None for stage in config.schedule.stages.values()):
        return config.parallel
    start_process_group(config.run)
    chosen: list[ParallelConfig | None] = [None]
    if dist.get_rank() == 0:
        stage = next_stage(config)
        chosen = [config.parallel if stage is None else config.layout_of(stage.config)]
    dist.broadcast_object_list(chosen)
    assert chosen[0] is not None, "rank 0 chooses a layout"
    return chosen[0]


def changes_layout(config: TrainConfig, layout: ParallelConfig, stage: Stage, world_size: int) -> bool:
    """Whether a stage cannot continue in the given layout with so many ranks."""
    return config.layout_of(stage.config) != layout or (stage.config.world_size or world_size) != world_size


def load_newest(
    config: TrainConfig, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer
) -> tuple[Path, dict[str, Any]] | None:
    """Continue from the run's newest whole checkpoint (a collective): its folder and state, or None without any.

    A damaged checkpoint is passed over, with a warning that names it and the reason, and set aside once an older
    one has been found whole.

    Raises:
        ValueError: every checkpoint is damaged, or the newest whole one is of another model, contract or precision.
    """
    checkpoints = run_checkpoints(config)
    found: list[list[Path]] = [[]]
    if dist.get_rank() == 0:
        found = [folders.step_folders(checkpoints)[::-1]]
    dist.broadcast_object_list(found)
    damaged: list[Path] = []
    for folder in found[0]:
        try:
            verify(folder, config.checkpoint.verify)
        except ValueError as error:
            damaged.append(folder)
            log.warning("passed over %s: %s", folder.name, error)
            continue
        stored = check_identity(folder, config.model, run_contract(config))
        _check_same_stage(folder, stored, config)
        precision = stored.get("layout", {}).get("precision", config.parallel.precision)
        if precision != config.parallel.precision:
            raise ValueError(
                f"parallel.precision ({config.parallel.precision}) differs from the checkpoint {folder} "
                f"({precision}); a run keeps its precision: start a new one from the weights."
            )
        _set_aside(damaged, folder)
        return folder, load_run(folder, chunks, optimizer)
    if damaged:
        raise ValueError(
            f"{checkpoints} holds no whole checkpoint: all of {[f.name for f in damaged]} are damaged. "
            "Restore one of them, or remove the folder to start the run anew."
        )
    return None


def _set_aside(damaged: list[Path], good: Path) -> None:
    error: Exception | None = None
    if dist.get_rank() == 0 and damaged:
        try:
            for folder in damaged:
                log.warning(
                    "%s is damaged and was renamed to %s; the run continues from %s",
                    folder.name,
                    folders.set_aside(folder).name,
                    good.name,
                )
            write_text(good.parent / LATEST, good.name + "\n")
        except OSError as caught:
            error = caught
    raise_together(error)

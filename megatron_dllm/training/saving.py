"""When a checkpoint is due, what it says of itself, its validation, and which ones are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_dllm.checkpoint.meta import CheckpointMeta, CorpusRecord, Position, Provenance, read_meta
from megatron_dllm.checkpoint.retention import retire
from megatron_dllm.checkpoint.saving import CheckpointWriter
from megatron_dllm.checkpoint.validation import Validation, write_validation
from megatron_dllm.config import TrainConfig
from megatron_dllm.diffusion.block_schedule import BlockSchedule, Stage
from megatron_dllm.parallel.agreement import failing_together
from megatron_dllm.run.names import TOKENIZER, VALIDATION
from megatron_dllm.training.engine import Engine, gathered_parameters
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.run_state import RunState
from megatron_dllm.training.start import semantics_of
from megatron_dllm.training.validating import Validator


@dataclass(frozen=True)
class SaveReason:
    """Why a checkpoint is written; its Position holds these fields.

    Attributes:
        is_stage_end: its stage has finished.
        is_validated: it is to be evaluated.
        save_number: counts the saves at the interval; None for the others.
    """

    is_stage_end: bool
    is_validated: bool
    save_number: int | None


def reason_to_save(
    interval: int, before: int, after: int, *, is_stage_end: bool, must_stop: bool, has_validation: bool
) -> SaveReason | None:
    """Whether a step calls for a checkpoint, and why.

    Args:
        interval: document tokens between saves; 0: none for that reason.
        before: document tokens consumed before the step.
        after: and after it.
        is_stage_end: the step has finished its stage.
        must_stop: the run was asked to stop.
        has_validation: the run has held-out documents.
    """
    is_due = interval > 0 and before // interval != after // interval
    if not (is_stage_end or is_due or must_stop):
        return None
    return SaveReason(is_stage_end, has_validation and (is_stage_end or is_due), after // interval if is_due else None)


@dataclass(frozen=True)
class Saver:
    """Writes the checkpoints of one run.

    Attributes:
        config: of the run, in the layout of this start.
        checkpoints: their folder.
        engine: what is saved.
        writer: how.
        validator: measures what was saved; None without held-out documents.
        observers: told before a save.
        source: what the start weights were converted from.
        corpora: by stage, what it trains on.
    """

    config: TrainConfig
    checkpoints: Path
    engine: Engine
    writer: CheckpointWriter
    validator: Validator | None
    observers: Sequence[Observer]
    source: str | None
    corpora: Mapping[str, tuple[CorpusRecord, ...]]

    def save(self, stage: Stage, state: RunState, reason: SaveReason) -> bool:
        """Write a checkpoint, evaluate it if it is to be, and retire old ones (a collective).

        Returns:
            False where a request to stop left the validation to the next start.
        """
        with failing_together():
            for observer in self.observers:
                observer.before_save(state.step)
        with gathered_parameters(self.engine, self.config.optimizer.overlap_param_gather):
            meta = self._meta(stage, state, reason)
            folder = self.writer.save(state.step, self.engine.chunks, self.engine.optimizer, meta, asdict(state))
            for observer in self.observers:
                observer.after_save(folder)
            validation = self._validate(stage, state, reason)
        if validation is not None:
            self.writer.finish()
            _write_validation(folder, validation)
        with failing_together():
            if dist.get_rank() == 0:
                rules = self.config.checkpoint
                retire(self.checkpoints, rules.keep_last, rules.keep_best, rules.keep_every)
        return validation is not None or not reason.is_validated

    def validate_resumed(self, folder: Path, schedule: BlockSchedule, state: RunState) -> None:
        """Evaluate the checkpoint a run continues from, if it ended between saving and evaluating it (a collective)."""
        due: list[tuple[str, bool] | None] = [None]
        if dist.get_rank() == 0 and self.validator is not None:
            position = read_meta(folder).position
            if position.is_validated and position.stage is not None and not (folder / VALIDATION).is_file():
                due = [(position.stage, position.is_stage_end)]
        dist.broadcast_object_list(due)
        if due[0] is None or self.validator is None:
            return
        name, is_stage_end = due[0]
        stage = next(stage for stage in schedule.stages if stage.name == name)
        validation = self.validator.validate(stage, state, is_stage_end)
        if validation is not None:
            _write_validation(folder, validation)

    def _validate(self, stage: Stage, state: RunState, reason: SaveReason) -> Validation | None:
        if not reason.is_validated or self.validator is None:
            return None
        return self.validator.validate(stage, state, reason.is_stage_end)

    def _meta(self, stage: Stage, state: RunState, reason: SaveReason) -> CheckpointMeta:
        config = self.config
        return CheckpointMeta(
            asdict(config.model),
            semantics_of(config, stage.config),
            Position(step=state.step, consumed_tokens=state.consumed_tokens, stage=stage.name, **asdict(reason)),
            Provenance(
                layout=asdict(config.parallel),
                world_size=dist.get_world_size(),
                tokenizer=f"../../{TOKENIZER}" if config.data.tokenizer else None,
                source=self.source,
            ),
            self.corpora[stage.name],
            None if stage.config.sft is None else asdict(stage.config.sft),
        )


def _write_validation(folder: Path, validation: Validation) -> None:
    """Write what a checkpoint came to, on rank 0 (a collective)."""
    with failing_together():
        if dist.get_rank() == 0:
            write_validation(folder, validation)

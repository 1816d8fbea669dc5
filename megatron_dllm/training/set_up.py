"""From a decided start and process groups to a run that stands: lease, folder, model, weights, observers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.saving import CheckpointWriter
from megatron_dllm.config import TrainConfig
from megatron_dllm.data.blend_stream import BlendStream
from megatron_dllm.hf.tokenizer_folder import tokenizer_files
from megatron_dllm.parallel.agreement import failing_together, raise_together
from megatron_dllm.parallel.device import local_device
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.run.code_version import code_state, commit
from megatron_dllm.run.files import copy_files
from megatron_dllm.run.history import record_start, replace_records
from megatron_dllm.run.lease import Lease, LeaseLost
from megatron_dllm.run.names import TOKENIZER, VALIDATION
from megatron_dllm.training.blends import corpora_of_stages, stage_shares
from megatron_dllm.training.frozen import load_frozen
from megatron_dllm.training.loading import load_start
from megatron_dllm.training.loop import Trainer
from megatron_dllm.training.observers.curves import forget_run
from megatron_dllm.training.observers.metrics_file import trim_metrics
from megatron_dllm.training.observers.progress import print_stage_table
from megatron_dllm.training.observers.standard import Setting
from megatron_dllm.training.parts import Parts
from megatron_dllm.training.past import as_yaml
from megatron_dllm.training.reference import open_reference
from megatron_dllm.training.run import Run
from megatron_dllm.training.run_state import RunState
from megatron_dllm.training.saving import Saver
from megatron_dllm.training.sources import Sources
from megatron_dllm.training.start import Start, decide_start, new_stream, run_checkpoints
from megatron_dllm.training.stop import StopRequest
from megatron_dllm.training.validating import Validator

log = logging.getLogger(__name__)


def set_up(
    given_config: TrainConfig, groups: Groups, start: Start, sources: Sources, parts: Parts, stop: StopRequest
) -> Trainer:
    """Open the run folder, build the model and load what the start decided on (a collective).

    Args:
        given_config: of the run.
        groups: in the layout of the start.
        start: as rank 0 decided it.
        sources: the run's documents.
        parts: what the run is put together from.
        stop: requests to stop.

    Raises:
        LeaseLost: a newer start of the run writes its folder.
        ValueError: a rank cannot read the documents that rank 0 has read, or every checkpoint is damaged.
        OSError: on every rank, where rank 0 cannot write the run folder.
    """
    config = replace(given_config, parallel=start.layout)
    checkpoints = run_checkpoints(config)
    device = local_device()
    stream = _open_stream(config, sources)
    lease = acquire_lease(checkpoints.parent)
    _prepare_folder(config, start)
    engine = parts.build_engine(config, groups)
    writer = _writer(config, groups, checkpoints, lease, parts)

    def decide_again(passed_over: Mapping[Path, str]) -> Start:
        # Not compared with the number of ranks: an older checkpoint may lie in a stage that wants others, and then
        # the loop ends this start in order.
        return decide_start(given_config, None, sources, passed_over)

    start = load_start(start, engine, decide_again, config.checkpoint.verify)
    state = start.resume.state if start.resume is not None else RunState(stream=stream.state_dict())
    stream.load_state_dict(state.stream)
    reference, teacher = start.reference, start.teacher
    state = replace(state, blends=stage_shares(config, sources)).beside(
        reference.fingerprint if reference else "", teacher.fingerprint if teacher else ""
    )
    with failing_together():
        if dist.get_rank() == 0:
            _write_run_files(given_config, start, checkpoints.parent)
        setting = Setting(config, given_config, checkpoints.parent, start.schedule, engine, device, start.wandb.mode)
        observers = [*parts.make_observers(setting), *parts.extra_observers]
    validator = None
    if sources.validation is not None:
        validator = Validator(config, engine, sources.validation, device, stop, observers)
    begun_with = start.resume or start.weights
    source = begun_with.stored.provenance.source if begun_with is not None else None
    run = Run(
        given_config=given_config,
        config=config,
        parts=parts,
        schedule=start.schedule,
        stream=stream,
        engine=engine,
        saver=Saver(
            config, checkpoints, engine, writer, validator, observers, source, corpora_of_stages(config, sources)
        ),
        observers=observers,
        spikes=parts.spike_rule(config),
        stop=stop,
        device=device,
        resumed_from=start.resume.folder if start.resume is not None else None,
        reference=open_reference(config, engine, reference, device),
        teacher=None if teacher is None else load_frozen(config, groups, teacher.folder, device),
    )
    return Trainer(run, state)


def _open_stream(config: TrainConfig, sources: Sources) -> BlendStream:
    """The sequence of rows from its beginning, on the ranks that have not opened the documents yet (a collective)."""
    stream: BlendStream | None = None
    error: Exception | None = None
    try:
        stream, _ = new_stream(config, sources), sources.validation
    except (ValueError, OSError) as caught:
        error = ValueError(f"rank {dist.get_rank()}: {caught}")
    raise_together(error)
    assert stream is not None, "no rank has failed"
    return stream


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


def _writer(
    config: TrainConfig, groups: Groups, checkpoints: Path, lease: Lease | None, parts: Parts
) -> CheckpointWriter:
    def before_publish() -> None:
        parts.before_publish()
        if lease is not None:
            lease.check()

    rules = config.checkpoint
    return CheckpointWriter(
        checkpoints, groups.data_context, rules.is_async, rules.timeout_minutes, before_publish, rules.verify
    )


def _prepare_folder(config: TrainConfig, start: Start) -> None:
    """On rank 0: tidy up what an interrupted start left, keep the tokenizer, say what the run will do.

    A collective, as every rank hears what the disk refuses.
    """
    with failing_together():
        if dist.get_rank() != 0:
            return
        checkpoints = run_checkpoints(config)
        checkpoints.mkdir(parents=True, exist_ok=True)
        for left in folders.clean_temporary(checkpoints):
            log.warning("removed %s, which an interrupted writer left behind", left)
        tokenizer = checkpoints.parent / TOKENIZER
        if config.data.tokenizer and not tokenizer.exists():
            copy_files(tokenizer_files(Path(config.data.tokenizer)), tokenizer)
        for text in (*start.warnings, *(f"{change} (changed since the start before)" for change in start.changes)):
            log.warning("%s", text)
        print_stage_table(config, start)


def _write_run_files(given_config: TrainConfig, start: Start, run_folder: Path) -> None:
    """Cut the records back to where the run continues, and keep its configuration and code.

    Not before the weights are loaded: the configuration of a start that is refused is not the run's.
    """
    resume = start.resume
    if resume is None:
        is_cut = trim_metrics(run_folder, -1)  # of a start that ended before its first checkpoint
    else:
        is_cut = trim_metrics(run_folder, resume.state.step, (resume.folder / VALIDATION).is_file())
    if is_cut:
        forget_run(run_folder)
    position = resume.stored.position if resume is not None else None
    is_finished = position is not None and start.schedule.is_finished(position.consumed_tokens)
    record_start(
        run_folder,
        start.changes,
        commit=commit(),
        world_size=dist.get_world_size(),
        step=position.step if position is not None else 0,
        is_finished=is_finished,
    )
    if not is_finished:  # a start that trains nothing leaves the records of those that did
        replace_records(run_folder, as_yaml(given_config), code_state())

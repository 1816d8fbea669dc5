"""The training loop: stages of the schedule, checkpoints, validation, metrics, signals.

A run is a pure function of its configuration and start weights. Its state is what `state.json` holds
(consumed tokens, step, data position) plus weights and optimizer; noise and order of the data need none.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.identity import FORMAT, check_start
from megatron_dllm.checkpoint.loading import load_weights
from megatron_dllm.checkpoint.manifest import read_json
from megatron_dllm.checkpoint.retention import retire
from megatron_dllm.checkpoint.saving import CheckpointWriter
from megatron_dllm.checkpoint.validation import write_validation
from megatron_dllm.config import ParallelConfig, StageConfig, TrainConfig
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import BatchLoader, GlobalStep, RowDataset
from megatron_dllm.data.packing import RowStream
from megatron_dllm.diffusion.block_schedule import BlockSchedule, Stage
from megatron_dllm.evaluation.elbo import EvaluationStopped, Validation, evaluate, validation_names
from megatron_dllm.model.objective import Objective, objective_of
from megatron_dllm.model.pipeline import EmbeddingNoise
from megatron_dllm.parallel.device import local_device
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.run.code_version import code_state
from megatron_dllm.run.exit_codes import EXIT_LAYOUT, EXIT_NON_FINITE, EXIT_PREEMPTED
from megatron_dllm.run.files import copy_folder, write_text
from megatron_dllm.run.names import CHECKPOINTS, CODE_STATE, CONFIG, CONTRACT, REPLAY, TOKENIZER, VALIDATION
from megatron_dllm.training.engine import build_engine, set_learning_rate
from megatron_dllm.training.observers.context_balance import context_balance
from megatron_dllm.training.observers.fingerprint import check_agreement, step_fingerprint
from megatron_dllm.training.observers.metrics import MetricsWriter, peak_memory_gib, step_record, trim_metrics
from megatron_dllm.training.observers.progress import Progress, print_stage_table
from megatron_dllm.training.observers.router_load import RouterLoad, imbalance
from megatron_dllm.training.replay import dump_step
from megatron_dllm.training.start import acquire_lease, changes_layout, load_newest, run_contract
from megatron_dllm.training.step import StepResult, train_step
from megatron_dllm.training.stop import StopRequest

log = logging.getLogger(__name__)
_SPIKE_WINDOW = 101
# So many steps without one that is applied end a run that skips them: the next ones would not be applied either.
_MAX_SKIPPED = 10


@dataclass
class RunState:
    """Where a run is: everything besides weights and optimizer that a checkpoint restores."""

    step: int = 0
    optimizer_step: int = 0
    consumed_tokens: int = 0
    stream: dict[str, Any] = field(default_factory=dict)
    # Of the steps applied in this stage: the next stage's noise gives other norms.
    grad_norms: list[float] = field(default_factory=list)
    num_skipped: int = 0  # in a row, up to now


class Trainer:
    """One run on this rank, from its configuration to its last checkpoint."""

    def __init__(self, config: TrainConfig, groups: Groups, layout: ParallelConfig | None = None) -> None:
        """Open data and run folder, build the model, load weights or resume.

        Args:
            config: of the run.
            groups: of this rank.
            layout: in which the process groups were made; None: the run's own. A stage may have another one.
        """
        self.given_config, self.groups = config, groups
        config = replace(config, parallel=layout or config.parallel)
        self.config = config
        self.folder = Path(config.run.root) / config.run.name
        self.checkpoints = self.folder / CHECKPOINTS
        self.is_rank_zero = dist.get_rank() == 0
        self.device = local_device()
        self.schedule = BlockSchedule.from_config(config.schedule)
        self.corpus = Corpus(config.data.train, config.model, config.data.tokenizer)
        self.validation = (
            Corpus(config.data.validation, config.model, config.data.tokenizer)
            if config.data.validation and config.evaluation.num_tokens
            else None
        )
        self.stream = RowStream(self.corpus.document_lengths, config.run.seed, config.data.packing_chunk)
        self.stop = StopRequest()
        self.lease = acquire_lease(self.folder)
        self._prepare_folder()
        self.engine = build_engine(config, groups)
        self.writer = CheckpointWriter(
            self.checkpoints,
            groups.data_context,
            config.checkpoint.is_async,
            config.checkpoint.timeout_minutes,
            self.lease.check if self.lease else None,
            config.checkpoint.verify,
        )
        self.state = RunState(stream=self.stream.state_dict())
        self._resumed_from: Path | None = None
        # What the start weights were converted from.
        self._source: str | None = None
        self._load()
        if self.is_rank_zero:  # not before: the configuration of a start that is refused is not the run's
            write_text(self.folder / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(self.given_config)))
            write_text(self.folder / CODE_STATE, code_state())
        model = config.model
        self.router = (
            RouterLoad(
                self.engine.chunks,
                model.num_layers,
                model.num_moe_experts,
                config.parallel.recompute == "full",
                groups.tensor,
            )
            if model.is_moe
            else None
        )
        self.metrics = MetricsWriter(self.folder, config) if self.is_rank_zero else None
        self.progress = Progress(self.schedule, self.is_rank_zero)

    # ---- start -------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        if self.is_rank_zero:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for left in folders.clean_temporary(self.checkpoints):
                log.warning("removed %s, which an interrupted writer left behind", left)
            tokenizer = self.folder / TOKENIZER
            if self.config.data.tokenizer and not tokenizer.exists():
                copy_folder(Path(self.config.data.tokenizer), tokenizer)
            print_stage_table(self.schedule, self.config, self.corpus)
        dist.barrier()

    def _load(self) -> None:
        config = self.config
        found = load_newest(config, self.engine.chunks, self.engine.optimizer) if config.checkpoint.resume else None
        if found is not None:
            folder, state = found
            self._resumed_from = folder
            self._source = read_json(folder / CONTRACT).get("source")
            self.state = RunState(**{k: state[k] for k in RunState.__dataclass_fields__ if k in state})
            self.stream.load_state_dict(self.state.stream)
            if self.is_rank_zero:
                trim_metrics(self.folder, self.state.step, (folder / VALIDATION).is_file())
                log.warning(
                    "resumed %s: step %d, %d tokens consumed", folder, self.state.step, self.state.consumed_tokens
                )
            return
        if self.is_rank_zero:
            trim_metrics(self.folder, -1)  # of a start that ended before its first checkpoint
        if config.checkpoint.load:
            start = folders.resolve_checkpoint(Path(config.checkpoint.load))
            self._source = check_start(start, config).get("source")
            load_weights(start, self.engine.chunks, config.checkpoint.verify)
            self.engine.optimizer.reload_model_params()
            if self.is_rank_zero:
                log.warning("started from the weights of %s", start)

    # ---- training ----------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end of the schedule; returns the process's exit code."""
        try:
            return self._run()
        finally:
            self.progress.close()
            if self.metrics is not None:
                self.metrics.close()

    def _run(self) -> int:
        if self.state.step == 0 and self.validation is not None and self.config.checkpoint.load:
            self._validate(self.schedule.stages[0], is_stage_end=True)
        self._validate_resumed()
        if self.stop.agreed(self.device):
            if self.is_rank_zero:
                log.warning("asked to stop before the first step")
            return EXIT_PREEMPTED
        while not self.schedule.is_finished(self.state.consumed_tokens):
            stage = self.schedule.stage_at(self.state.consumed_tokens)
            if changes_layout(self.given_config, self.config.parallel, stage, dist.get_world_size()):
                self.writer.finish()
                if self.is_rank_zero:
                    log.warning(
                        "stage %s has another layout: start again with %d ranks to continue",
                        stage.name,
                        stage.config.world_size or dist.get_world_size(),
                    )
                return EXIT_LAYOUT
            started = time.perf_counter()
            objective = objective_of(stage.config, self.config.noise)
            for step in self._loader(stage.config, objective):
                code = self._step(stage, objective, step, started)
                if code is not None:
                    return code
                if self.schedule.is_finished(self.state.consumed_tokens) or (
                    self.schedule.stage_at(self.state.consumed_tokens) != stage
                ):
                    break
                started = time.perf_counter()
        self.writer.finish()
        return 0

    def _loader(self, stage: StageConfig, objective: Objective) -> Iterator[GlobalStep]:
        config = self.config
        geometry = RowGeometry.of_stage(stage, config.schedule, config.data)
        dataset = RowDataset(
            self.corpus,
            geometry,
            objective.noise,
            config.run.seed,
            config.model.mask_token_id,
            config.model.pad_token_id,
        )
        return iter(
            BatchLoader(
                dataset,
                self.stream,
                global_batch_size=stage.global_batch_size,
                micro_batch_size=stage.micro_batch_size,
                data_parallel_rank=self.groups.data.rank(),
                data_parallel_size=self.groups.data.size(),
                num_workers=config.data.num_workers,
            )
        )

    def _step(self, stage: Stage, objective: Objective, step: GlobalStep, started: float) -> int | None:
        """One optimizer step with everything around it; an exit code where the run must end.

        `started` is when its rows were asked for.
        """
        state, config = self.state, self.config
        learning_rate = stage.learning_rate(state.consumed_tokens)
        set_learning_rate(self.engine.optimizer, learning_rate)
        before, after = state.consumed_tokens, state.consumed_tokens + step.num_document_tokens
        finished = self.schedule.finished_stage(before, after)
        is_logged = finished is not None or (state.step + 1) % config.logging.interval_steps == 0
        result = self._train_step(objective, step, is_logged)
        if not result.is_applied:
            dump_step(
                self.folder,
                state.step,
                step.micro_batches,
                {
                    "stage": stage.name,
                    "reason": result.reason,
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "embedding_noise": asdict(self._embedding_noise()),
                    "config": asdict(self.given_config),
                },
                self.groups,
            )
            state.num_skipped += 1
            if config.optimizer.on_non_finite == "stop" or state.num_skipped >= _MAX_SKIPPED:
                self.writer.finish()
                in_a_row = f" ({state.num_skipped} steps in a row)" if state.num_skipped > 1 else ""
                log.error(
                    "step %d: %s%s; the batch is in %s", state.step, result.reason, in_a_row, self.folder / REPLAY
                )
                return EXIT_NON_FINITE
            log.warning("step %d skipped: %s", state.step, result.reason)
        state.step += 1
        state.optimizer_step += int(result.is_applied)
        state.consumed_tokens = after
        state.stream = step.stream_state
        if result.is_applied:
            state.num_skipped = 0
            state.grad_norms = [*state.grad_norms, result.grad_norm][-_SPIKE_WINDOW:]
        seconds = time.perf_counter() - started
        self.progress.advance(
            stage, state.step, state.consumed_tokens, result.loss, learning_rate, step.num_document_tokens / seconds
        )
        if finished is not None:
            state.grad_norms = []
        if is_logged:
            self._log(stage, result, learning_rate, step, seconds)
        self.writer.poll()
        must_stop = self.stop.agreed(self.device)
        interval = config.checkpoint.save_interval_tokens
        is_due = interval > 0 and before // interval != state.consumed_tokens // interval
        if finished is not None or is_due or must_stop:
            is_validated = self.validation is not None and (finished is not None or is_due)
            details = {
                "is_stage_end": finished is not None,
                "is_validated": is_validated,
                "save_number": state.consumed_tokens // interval if is_due else None,
            }
            is_complete = self._save(stage, details)
            must_stop = not is_complete or (must_stop and not self.schedule.is_finished(state.consumed_tokens))
        if must_stop:
            self.writer.finish()
            if self.is_rank_zero:
                log.warning("asked to stop: saved at step %d", state.step)
            return EXIT_PREEMPTED
        return None

    def _train_step(self, objective: Objective, step: GlobalStep, is_logged: bool) -> StepResult:
        state, noise = self.state, self._embedding_noise()
        limit = math.inf
        if self.config.optimizer.spike_factor > 0 and len(state.grad_norms) >= _SPIKE_WINDOW // 2:
            limit = self.config.optimizer.spike_factor * sorted(state.grad_norms)[len(state.grad_norms) // 2]
        if self.router is None or not is_logged:
            return train_step(self.engine, step.micro_batches, self.device, objective, noise, spike_limit=limit)
        with self.router.counting():
            return train_step(
                self.engine, step.micro_batches, self.device, objective, noise, self.router.observe, limit
            )

    def _embedding_noise(self) -> EmbeddingNoise:
        """Of the step that comes next."""
        model, step = self.config.model, self.state.step
        share = max(0.0, 1.0 - step / model.mask_embedding_noise_steps) if model.mask_embedding_noise_steps else 0.0
        return EmbeddingNoise(model.mask_embedding_noise * share, self.config.run.seed * 1000003 + step)

    def _log(self, stage: Stage, result: StepResult, learning_rate: float, step: GlobalStep, seconds: float) -> None:
        load = self.router.totals(self.device) if self.router is not None else None
        norm = self._mask_embedding_norm()
        fingerprint = step_fingerprint(step.micro_batches, self.groups.data)
        check_agreement(fingerprint)
        balance = context_balance(step.micro_batches, self.config.parallel, self.groups.data, self.device)
        if self.metrics is None:
            return
        record: dict[str, Any] = {
            "stage": stage.name,
            "stage_index": stage.index,
            "block_size": stage.config.block_size,
            "consumed_tokens": self.state.consumed_tokens,
            "learning_rate": learning_rate,
            **step_record(result),
            f"loss_block/{stage.config.block_size}": result.loss,
            "data_fingerprint": fingerprint,
            **balance,
            "tokens_per_second": step.num_document_tokens / seconds,
            "forward_tokens_per_second": step.num_forward_tokens / seconds,
            "step_seconds": seconds,
            "mask_embedding_norm": norm,
            "peak_memory_gib": peak_memory_gib(),
        }
        if load is not None and load.sum() > 0:
            record |= {f"router_imbalance/{role}": value for role, value in imbalance(load).items()}
            record["router_load"] = load.sum(0).tolist()
        self.metrics.write(self.state.step, record)

    def _mask_embedding_norm(self) -> float:
        """L2 norm of the mask token's embedding row (a collective)."""
        square = torch.zeros(1, dtype=torch.float64, device=self.device)
        for chunk in self.engine.chunks:
            model = chunk.module.module if hasattr(chunk.module, "module") else chunk.module
            if model.pre_process:
                embedding = model.embedding.word_embeddings
                if self.config.optimizer.overlap_param_gather:  # the step moved this rank's share alone, as yet
                    chunk.param_to_bucket_group[embedding.weight].start_param_sync(force_sync=True)
                local = self.config.model.mask_token_id - embedding.vocab_start_index
                is_owner = self.groups.data_context.rank() == 0
                if is_owner and 0 <= local < embedding.weight.shape[0]:
                    square += embedding.weight[local].detach().double().square().sum()
        dist.all_reduce(square)
        return float(square.sqrt())

    # ---- checkpoints -------------------------------------------------------------------------

    def _save(self, stage: Stage, details: dict[str, Any]) -> bool:
        """Write a checkpoint and evaluate it if it is to be; false where a request to stop left that to the next start.

        `details`, for its contract.json: `is_stage_end`, `is_validated`, and `save_number`, which counts the saves
        at the interval.

        A job that is asked to stop has a grace period, which a validation may exceed.
        """
        overlap = self.config.optimizer.overlap_param_gather
        if overlap:
            for chunk in self.engine.chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
        folder = self.writer.save(
            self.state.step,
            self.engine.chunks,
            self.engine.optimizer,
            {**self._contract(stage), **details},
            asdict(self.state),
        )
        is_validated = details["is_validated"]
        validation = self._validate(stage, details["is_stage_end"]) if is_validated else None
        if overlap:
            for chunk in self.engine.chunks:
                chunk.enable_forward_pre_hook()
        if validation is not None:
            self.writer.finish()
            if self.is_rank_zero:
                write_validation(folder, validation.to_json())
        if self.is_rank_zero:
            rules = self.config.checkpoint
            retire(self.checkpoints, rules.keep_last, rules.keep_best, rules.keep_every)
        dist.barrier()
        return validation is not None or not is_validated

    def _validate_resumed(self) -> None:
        """Evaluate the checkpoint a run continues from, if the run ended between saving and evaluating it."""
        is_due = [False]
        if self.is_rank_zero and self._resumed_from is not None and self.validation is not None:
            contract = read_json(self._resumed_from / CONTRACT)
            is_due = [contract["is_validated"] and not (self._resumed_from / VALIDATION).is_file()]
        dist.broadcast_object_list(is_due)
        if not is_due[0] or self._resumed_from is None:
            return
        contract = read_json(self._resumed_from / CONTRACT)
        stage = next(stage for stage in self.schedule.stages if stage.name == contract["stage"])
        validation = self._validate(stage, contract["is_stage_end"])
        if self.is_rank_zero and validation is not None:
            write_validation(self._resumed_from, validation.to_json())

    def _validate(self, stage: Stage, is_stage_end: bool) -> Validation | None:
        """Target block size at every checkpoint, all of them at a stage's end; AR models by their exact NLL.

        None where the run was asked to stop, before or meanwhile.
        """
        names = validation_names(self.config, stage.config)[: None if is_stage_end else 1]
        self.progress.note("validating")
        try:
            result = evaluate(
                self.engine.chunks,
                self.config,
                self.groups,
                self.validation,
                names,
                self.device,
                lambda: self.stop.agreed(self.device),
            )
        except EvaluationStopped:
            return None
        if self.metrics is not None:
            self.metrics.write(
                self.state.step,
                {
                    "validation": True,
                    "stage": stage.name,
                    "consumed_tokens": self.state.consumed_tokens,
                    "is_stage_end": is_stage_end,
                    **{f"validation_elbo/{name}": value for name, value in result.nats_per_token.items()},
                    **{f"validation_bits_per_byte/{name}": value for name, value in result.bits_per_byte.items()},
                },
            )
        return result

    def _contract(self, stage: Stage) -> dict[str, Any]:
        config = self.config
        return {
            "format": FORMAT,
            "model": asdict(config.model),
            "contract": {
                **run_contract(config),
                "shift": objective_of(stage.config, config.noise).shift,
                "block_size": stage.config.block_size,
            },
            "step": self.state.step,
            "consumed_tokens": self.state.consumed_tokens,
            "stage": stage.name,
            "layout": asdict(config.parallel),
            "world_size": dist.get_world_size(),
            "tokenizer": f"../../{TOKENIZER}" if config.data.tokenizer else None,
            "source": self._source,
        }

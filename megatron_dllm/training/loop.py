"""The life of a run: stages, steps, saves, until the schedule is done or the run is asked to stop.

A run is a pure function of its configuration and start weights. Its state is what `state.json` holds
(consumed tokens, step, data position) plus weights and optimizer; noise and order of the data need none.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from megatron_dllm.config import TrainConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.data.loader import GlobalStep
from megatron_dllm.diffusion.block_schedule import Stage
from megatron_dllm.model.objective import Objective
from megatron_dllm.model.pipeline import EmbeddingNoise
from megatron_dllm.parallel.agreement import failing_together
from megatron_dllm.run.exit_codes import EXIT_LAYOUT, EXIT_NON_FINITE, EXIT_PREEMPTED
from megatron_dllm.run.names import REPLAY
from megatron_dllm.training.parameter_rates import set_learning_rate
from megatron_dllm.training.reports import StepReport
from megatron_dllm.training.run import Run
from megatron_dllm.training.run_state import RunState
from megatron_dllm.training.saving import reason_to_save
from megatron_dllm.training.stage_rows import stage_loader
from megatron_dllm.training.start import changes_layout
from megatron_dllm.training.step import StepResult, train_step
from megatron_dllm.training.teaching import teach
from megatron_dllm.training.weighing import check_start_margin, weigh_batches

log = logging.getLogger(__name__)


class Trainer:
    """Takes a run from where it stands to the end of its schedule."""

    def __init__(self, run: Run, state: RunState) -> None:
        """Args: the run, and where it stands."""
        self.run, self.state = run, state

    def train(self) -> int:
        """Train to the end of the schedule; returns the process's exit code."""
        try:
            code = self._train()
        except BaseException:
            with contextlib.suppress(OSError):  # the first error counts: a full disk takes no last words either
                self._close()
            raise
        self._close()
        return code

    def _close(self) -> None:
        for observer in self.run.observers:
            observer.close()

    def _train(self) -> int:
        run = self.run
        self._validate_start()
        if run.stop.agreed(run.device):
            _say("asked to stop before the first step")
            return EXIT_PREEMPTED
        name = run.config.run.name
        if run.schedule.is_finished(self.state.consumed_tokens):
            _say(f"{name} has finished before, at step {self.state.step}: there is nothing left to train")
            run.saver.writer.finish()
            return 0
        while not run.schedule.is_finished(self.state.consumed_tokens):
            stage = run.schedule.stage_at(self.state.consumed_tokens)
            num_ranks = dist.get_world_size()
            if changes_layout(run.given_config, run.config.parallel, stage, num_ranks):
                run.saver.writer.finish()
                wanted = stage.config.world_size or num_ranks
                _say(f"stage {stage.name} has another layout: start again with {wanted} ranks to continue")
                return EXIT_LAYOUT
            code = self._train_stage(stage)
            if code is not None:
                return code
        run.saver.writer.finish()
        consumed = self.state.consumed_tokens
        folder = run.saver.checkpoints.parent
        _say(f"{name} has finished: {self.state.step:,} steps, {consumed:,} document tokens; it is in {folder}")
        return 0

    def _validate_start(self) -> None:
        """The start weights, or a checkpoint that the last start of the run left without its validation."""
        run = self.run
        if run.resumed_from is not None:
            run.saver.validate_resumed(run.resumed_from, run.schedule, self.state)
        elif run.config.checkpoint.load and run.saver.validator is not None:
            run.saver.validator.validate(run.schedule.stages[0], self.state, is_stage_end=True)

    def _train_stage(self, stage: Stage) -> int | None:
        """Steps until the stage is done; an exit code where the run must end."""
        objective = self.run.parts.objective_of(stage.config, self.run.config.noise)
        started = time.perf_counter()
        for step in self._steps(stage, objective):
            is_stage_end, code = self._step(stage, objective, step, started)
            if code is not None or is_stage_end:
                return code
            started = time.perf_counter()
        raise AssertionError("the sequence of rows has no end")

    def _steps(self, stage: Stage, objective: Objective) -> Iterator[GlobalStep]:
        """This rank's part of every global batch of a stage, from the run's position on."""
        run = self.run
        run.stream.use(self.state.blends[stage.name])
        consumed = self.state.consumed_tokens

        def progress(num_tokens: int) -> float:
            return stage.progress(consumed + num_tokens)

        return iter(stage_loader(run.config, stage.config, objective, run.stream, run.engine.groups, progress))

    def _step(self, stage: Stage, objective: Objective, step: GlobalStep, started: float) -> tuple[bool, int | None]:
        """One optimizer step with everything around it.

        Args:
            stage: that the step belongs to.
            objective: of the stage.
            step: the rows.
            started: when they were asked for.

        Returns:
            Whether the stage is done, and an exit code where the run must end.
        """
        before, after = self.state.consumed_tokens, self.state.consumed_tokens + step.num_document_tokens
        is_stage_end = self.run.schedule.finished_stage(before, after) is not None
        report = self._update(stage, objective, step, started, is_stage_end)
        if not report.result.is_applied and self._must_end(report):
            return is_stage_end, EXIT_NON_FINITE
        self.state = self.state.after(step, report.result, self.run.spikes.window, is_stage_end)
        self._tell(report)
        return is_stage_end, self._save_or_stop(stage, before, is_stage_end, report.result.must_stop)

    def _update(
        self, stage: Stage, objective: Objective, step: GlobalStep, started: float, is_stage_end: bool
    ) -> StepReport:
        """Forward, backward and update, and what is to be said of them."""
        run, state = self.run, self.state
        learning_rate = stage.learning_rate(state.consumed_tokens)
        set_learning_rate(run.engine.optimizer, learning_rate)
        noise = embedding_noise(run.config, state.step)
        is_logged = is_stage_end or (state.step + 1) % run.config.logging.interval_steps == 0
        return StepReport(
            stage=stage,
            index=state.step,
            consumed_tokens=state.consumed_tokens + step.num_document_tokens,
            learning_rate=learning_rate,
            result=self._train_step(objective.at(state.stage_step), step, noise, is_logged),
            embedding_noise=noise,
            micro_batches=step.micro_batches,
            num_document_tokens=step.num_document_tokens,
            num_forward_tokens=step.num_forward_tokens,
            stream_state=step.stream_state,
            seconds=time.perf_counter() - started,
            is_logged=is_logged,
            stage_step=state.stage_step,
        )

    def _train_step(self, objective: Objective, step: GlobalStep, noise: EmbeddingNoise, is_logged: bool) -> StepResult:
        run = self.run
        batches, weighing = weigh_batches(
            run.engine.chunks, step.micro_batches, run.device, run.engine.groups, objective, run.reference
        )
        if weighing is not None and self.state.step == 0:
            check_start_margin(objective, weighing)
        taught = teach(run.teacher, batches, objective)
        with contextlib.ExitStack() as stack:
            watches = [stack.enter_context(observer.around_step(is_logged)) for observer in run.observers]
            told = [watch for watch in watches if watch is not None]

            def observe(batch: Batch) -> None:
                for watch in told:
                    watch(batch)

            limit = run.spikes.limit(self.state.grad_norms)
            must_stop = run.stop.is_asked
            result = train_step(run.engine, batches, run.device, objective, noise, observe, limit, taught, must_stop)
        return result if weighing is None else replace(result, sums=weighing.logged(result.sums))

    def _must_end(self, report: StepReport) -> bool:
        """Whether a step that was not applied ends the run; its batch is kept either way."""
        run = self.run
        for observer in run.observers:
            observer.after_withheld_step(report)
        num_skipped = self.state.num_skipped + 1
        if run.config.optimizer.on_non_finite == "skip" and num_skipped < run.spikes.max_skipped:
            log.warning("step %d skipped: %s", report.index, report.result.reason)
            return False
        run.saver.writer.finish()
        in_a_row = f" ({num_skipped} steps in a row)" if num_skipped > 1 else ""
        folder = run.saver.checkpoints.parent / REPLAY
        log.error("step %d: %s%s; the batch is in %s", report.index, report.result.reason, in_a_row, folder)
        return True

    def _tell(self, report: StepReport) -> None:
        measured: dict[str, Any] = {}
        if report.is_logged:
            for observer in self.run.observers:
                measured |= observer.measure(report)
        # Rank 0 writes what is logged: where it cannot, the ranks end together.
        with failing_together() if report.is_logged else contextlib.nullcontext():
            for observer in self.run.observers:
                observer.after_step(report, measured)

    def _save_or_stop(self, stage: Stage, before: int, is_stage_end: bool, must_stop: bool) -> int | None:
        """Write the checkpoint that is due; the exit code of a run that was asked to stop."""
        run, state = self.run, self.state
        run.saver.writer.poll()
        reason = reason_to_save(
            run.config.checkpoint.save_interval_tokens,
            before,
            state.consumed_tokens,
            is_stage_end=is_stage_end,
            must_stop=must_stop,
            has_validation=run.saver.validator is not None,
        )
        if reason is not None:
            is_complete = run.saver.save(stage, state, reason)
            must_stop = not is_complete or (must_stop and not run.schedule.is_finished(state.consumed_tokens))
        if not must_stop:
            return None
        run.saver.writer.finish()
        _say(f"asked to stop: saved at step {state.step}")
        return EXIT_PREEMPTED


def embedding_noise(config: TrainConfig, step: int) -> EmbeddingNoise:
    """The noise on masked embeddings in the step after so many."""
    training = config.training
    num_steps = training.mask_embedding_noise_steps
    share = max(0.0, 1.0 - step / num_steps) if num_steps else 0.0
    return EmbeddingNoise(training.mask_embedding_noise * share, config.run.seed * 1000003 + step)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        log.warning("%s", text)

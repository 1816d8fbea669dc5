"""What a person sees of a run: the stage table, every stage, validation and checkpoint, and a progress bar.

Where nobody looks at a terminal, a line now and then stands for the bar: one for each percent, and one an hour, so that
a log tells the run's story on a few pages however long it runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from megatron_dllm.config import TrainConfig
from megatron_dllm.diffusion.block_schedule import BlockSchedule, Stage, format_table
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.reports import StepReport, ValidationReport
from megatron_dllm.training.start import Start

_LEAST_SECONDS, _MOST_SECONDS = 15.0, 3600.0


def print_stage_table(config: TrainConfig, start: Start) -> None:
    """Print what the schedule will do, with the steps that were estimated, and the passes over the corpus."""
    console = Console(soft_wrap=True)
    tokens, corpus = start.schedule.total_tokens, start.num_corpus_tokens
    # The fill of chats counts as document tokens, and is no part of the corpus.
    is_filled = any(stage.config.sft is not None and stage.config.sft.fill != "none" for stage in start.schedule.stages)
    passes = (
        f"{corpus:,} tokens without the fill" if is_filled else f"{tokens / corpus:.2f} epochs of {corpus:,} tokens"
    )
    console.print(
        f"[bold]{config.run.name}[/bold]: {tokens:,} document tokens of {', '.join(config.train_corpora)} ({passes}), "
        f"{sum(row.steps or 0 for row in start.table):,} steps",
        highlight=False,
    )
    console.print(format_table(start.table), highlight=False)


class Progress(Observer):
    """Progress over the whole schedule, in document tokens. Rank 0 alone has it."""

    def __init__(self, schedule: BlockSchedule) -> None:
        self._console = Console()
        self._total = schedule.total_tokens
        self._last_line, self._last_percent = 0.0, -1
        self._stage: Stage | None = None
        self._bar: RichProgress | None = None
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("starting", total=self._total)
            self._bar.start()

    def after_step(self, report: StepReport, measured: Mapping[str, Any]) -> None:
        """Show where the run is."""
        if self._stage != report.stage:
            self._stage = report.stage
            self._say(_stage_line(report.stage))
        text = (
            f"{report.stage.name} block {report.stage.config.block_size} step {report.step} "
            f"loss {report.result.loss:.3f} lr {report.learning_rate:.1e} "
            f"{report.num_document_tokens / report.seconds:,.0f} tok/s"
        )
        consumed = report.consumed_tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=min(consumed, self._total), description=text)
        elif self._is_time(100 * consumed // self._total):
            self._say(f"{100.0 * consumed / self._total:5.1f}%  {text}")

    def _is_time(self, percent: int) -> bool:
        """Whether a line is due in a log; if so, the next is counted from here."""
        seconds = time.monotonic() - self._last_line
        if seconds < (_LEAST_SECONDS if percent > self._last_percent else _MOST_SECONDS):
            return False
        self._last_line, self._last_percent = time.monotonic(), percent
        return True

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def before_save(self, step: int) -> None:
        """Say what goes on between steps."""
        self._note("saving")

    def after_save(self, folder: Path) -> None:
        """Name the checkpoint."""
        self._say(f"checkpoint {folder}")

    def before_validation(self, stage: Stage) -> None:
        """Say what goes on between steps."""
        self._note("validating")

    def after_validation(self, report: ValidationReport) -> None:
        """Say what it came to."""
        values = report.validation.nats_per_token
        found = ", ".join(f"{name if name == 'ar' else f'block {name}'} {value:.4f}" for name, value in values.items())
        self._say(f"validation after step {report.step} ({report.stage.name}), ELBO in nats per token: {found}")

    def _note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _stage_line(stage: Stage) -> str:
    config = stage.config
    return (
        f"stage {stage.name}: {config.objective}, block {config.block_size}, until {stage.end:,} document tokens, "
        f"learning rate {config.learning_rate:g}"
    )

"""What a person sees of a run: the stage table before it starts, then a progress bar (a line now and then in a log)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from megatron_dllm.config import TrainConfig
from megatron_dllm.diffusion.block_schedule import BlockSchedule, Stage, format_table
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.reports import StepReport
from megatron_dllm.training.start import Start

_SECONDS_BETWEEN_LINES = 15.0


def print_stage_table(config: TrainConfig, start: Start) -> None:
    """Print what the schedule will do, with the steps that were estimated, and the passes over the corpus."""
    console = Console(soft_wrap=True)
    tokens, corpus = start.schedule.total_tokens, start.num_corpus_tokens
    console.print(
        f"[bold]{config.run.name}[/bold]: {tokens:,} document tokens of {config.data.train} "
        f"({tokens / corpus:.2f} epochs of {corpus:,} tokens), {sum(row.steps or 0 for row in start.table):,} steps",
        highlight=False,
    )
    console.print(format_table(start.table), highlight=False)


class Progress(Observer):
    """Progress over the whole schedule, in document tokens. Rank 0 alone has it."""

    def __init__(self, schedule: BlockSchedule) -> None:
        self._console = Console()
        self._total = schedule.total_tokens
        self._last_line = 0.0
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
        text = (
            f"{report.stage.name} block {report.stage.config.block_size} step {report.step} "
            f"loss {report.result.loss:.3f} lr {report.learning_rate:.1e} "
            f"{report.num_document_tokens / report.seconds:,.0f} tok/s"
        )
        consumed = report.consumed_tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=min(consumed, self._total), description=text)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(f"{100.0 * consumed / self._total:5.1f}%  {text}", highlight=False, soft_wrap=True)

    def before_save(self, step: int) -> None:
        """Say what goes on between steps."""
        self._note("saving")

    def before_validation(self, stage: Stage) -> None:
        """Say what goes on between steps."""
        self._note("validating")

    def _note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

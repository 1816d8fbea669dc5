"""What a person sees of a run: the stage table before it starts, then a progress bar (a line now and then in a log)."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from megatron_dllm.config import TrainConfig
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import estimate_fill
from megatron_dllm.diffusion.block_schedule import BlockSchedule, RowEstimate, Stage, format_table, stage_table

_SECONDS_BETWEEN_LINES = 15.0


def print_stage_table(schedule: BlockSchedule, config: TrainConfig, corpus: Corpus) -> None:
    """Print what the schedule will do, with steps estimated by packing the first chunks of the corpus."""
    estimates = {}
    for stage in schedule.stages:
        geometry = RowGeometry.of_stage(stage.config, config.schedule, config.data)
        fill = estimate_fill(corpus.document_lengths, geometry, seed=config.run.seed, chunk=config.data.packing_chunk)
        estimates[stage.name] = RowEstimate(fill.document_tokens, fill.forward_tokens)
    console = Console(soft_wrap=True)
    rows = stage_table(schedule, estimates)
    console.print(
        f"[bold]{config.run.name}[/bold]: {schedule.total_tokens:,} document tokens of {corpus.prefix} "
        f"({schedule.total_tokens / corpus.num_tokens:.2f} epochs of {corpus.num_tokens:,} tokens), "
        f"{sum(row.steps or 0 for row in rows):,} steps",
        highlight=False,
    )
    console.print(format_table(rows), highlight=False)


class Progress:
    """Progress over the whole schedule, in document tokens. Silent where `is_shown` is false."""

    def __init__(self, schedule: BlockSchedule, is_shown: bool) -> None:
        self._console = Console()
        self._total = schedule.total_tokens
        self._is_shown = is_shown
        self._last_line = 0.0
        self._bar: RichProgress | None = None
        if is_shown and self._console.is_terminal:
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

    def advance(
        self, stage: Stage, step: int, consumed: int, loss: float, learning_rate: float, tokens_per_second: float
    ) -> None:
        """Show the state after a step."""
        text = (
            f"{stage.name} block {stage.config.block_size} step {step} loss {loss:.3f} "
            f"lr {learning_rate:.1e} {tokens_per_second:,.0f} tok/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=min(consumed, self._total), description=text)
        elif self._is_shown and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(f"{100.0 * consumed / self._total:5.1f}%  {text}", highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Say what goes on between steps."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

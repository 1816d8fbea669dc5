"""The schedule of a run: warmup, stable and decay stages (LLaDA2.0 section 4.1) laid end to end.

Stages are explicit in the configuration; nothing here invents a block size. The schedule is immutable and a
pure function of *consumed document tokens*, so that number is all the state a checkpoint has to carry.

Boundaries are exact. A step belongs to the stage in which it starts: the one with start <= consumed < end.
A stage ends with the first step after which consumed >= end. That step may overshoot the end by less than
one global batch, which the next stage has then already consumed; the boundaries themselves do not move.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_dllm.config import ScheduleConfig, StageConfig
from megatron_dllm.config.levels import warn_levels


@dataclass(frozen=True)
class Stage:
    """One stage, and between which numbers of consumed document tokens it lies.

    Attributes:
        name: its key in the configuration.
        index: its place in the schedule.
        config: its geometry, batch, learning rate and noise.
        start: consumed document tokens at which it begins.
        end: consumed document tokens at which it is finished.
    """

    name: str
    index: int
    config: StageConfig
    start: int
    end: int

    def progress(self, consumed: int) -> float:
        """Share of the stage that is done: 0 before its start, 1 from its end on."""
        return min(max((consumed - self.start) / (self.end - self.start), 0.0), 1.0)

    def remaining(self, consumed: int) -> int:
        """Document tokens left in the stage, between 0 and its size."""
        return min(max(self.end - consumed, 0), self.end - self.start)

    def learning_rate(self, consumed: int) -> float:
        """Learning rate of a step that starts at `consumed` document tokens.

        First a line from 0 over lr_warmup_tokens (its first step fills Adam's moments and moves nothing),
        then lr_shape from learning_rate to final_learning_rate over the rest of the stage.
        """
        config = self.config
        done = max(consumed - self.start, 0)
        if done < config.lr_warmup_tokens:
            return config.learning_rate * done / config.lr_warmup_tokens
        if config.lr_shape == "constant" or config.final_learning_rate is None:
            return config.learning_rate
        span = self.end - self.start - config.lr_warmup_tokens
        share = min((done - config.lr_warmup_tokens) / span, 1.0)
        if config.lr_shape == "cosine":
            share = (1.0 - math.cos(math.pi * share)) / 2.0
        return config.learning_rate + (config.final_learning_rate - config.learning_rate) * share


@dataclass(frozen=True)
class BlockSchedule:
    """Every stage of a run, in order.

    Attributes:
        stages: the stages; each starts where the one before it ends.
    """

    stages: tuple[Stage, ...]

    @classmethod
    def from_config(
        cls, config: ScheduleConfig, epoch_tokens: Mapping[str, int] | None = None, prompted: Collection[str] = ()
    ) -> BlockSchedule:
        """Lay the configured stages end to end.

        Args:
            config: a schedule whose own `validate` has passed.
            epoch_tokens: document tokens of one pass over the corpus, by stage name; needed for stages in epochs.
            prompted: stages with documents whose tokens do not all carry a loss, beside those that train chats.

        Returns:
            The schedule.

        Raises:
            ValueError: naming a stage that is too short, or whose warmup does not fit into it.
        """
        stages: list[Stage] = []
        start = 0
        for name, stage in config.stages.items():
            num_tokens = _num_tokens(name, stage, epoch_tokens or {})
            end = start + num_tokens
            warmup = stage.lr_warmup_tokens or round(stage.lr_warmup_share * num_tokens)
            resolved = replace(stage, num_tokens=num_tokens, lr_warmup_tokens=warmup)
            stages.append(Stage(name, len(stages), resolved, start, end))
            start = end
        if not stages:
            raise ValueError("schedule.stages ({}) must name at least one stage; choose a schedule group.")
        schedule = cls(tuple(stages))
        schedule._check_lengths(config.tokens_per_row, prompted)
        schedule._check_rates()
        return schedule

    def warnings(self) -> list[str]:
        """Settings without effect, a sentence each."""
        unused = [
            f"schedule.stages.{stage.name}.final_learning_rate ({stage.config.final_learning_rate:g}) has no effect "
            "with lr_shape constant; use linear or cosine."
            for stage in self.stages
            if stage.config.lr_shape == "constant"
            and stage.config.final_learning_rate not in (None, stage.config.learning_rate)
        ]
        for stage in self.stages:
            unused += warn_levels(f"schedule.stages.{stage.name}", stage.config)
        return unused

    @property
    def total_tokens(self) -> int:
        """Document tokens of the whole schedule."""
        return self.stages[-1].end

    def is_finished(self, consumed: int) -> bool:
        """Whether no further step may start."""
        return consumed >= self.total_tokens

    def remaining(self, consumed: int) -> int:
        """Document tokens left in the whole schedule."""
        return max(self.total_tokens - consumed, 0)

    def stage_at(self, consumed: int) -> Stage:
        """The stage that owns a step starting at `consumed` document tokens.

        Args:
            consumed: document tokens consumed so far; the schedule must not be finished.
        """
        assert 0 <= consumed < self.total_tokens, f"consumed ({consumed}) lies outside [0, {self.total_tokens})"
        return next(stage for stage in self.stages if consumed < stage.end)

    def learning_rate(self, consumed: int) -> float:
        """Learning rate of the step that starts at `consumed` document tokens."""
        return self.stage_at(consumed).learning_rate(consumed)

    def finished_stage(self, before: int, after: int) -> Stage | None:
        """The stage that a step has finished.

        Args:
            before: document tokens consumed when the step started.
            after: the same when it ended.

        Returns:
            The stage whose end lies in (before, after], or None. There is at most one: `from_config` refuses
            a stage that a single step could jump over.
        """
        return next((stage for stage in self.stages if before < stage.end <= after), None)

    def _check_lengths(self, tokens_per_row: int, prompted: Collection[str]) -> None:
        """A step overshoots into the next stage, so that one too must be longer than the batch of the step."""
        previous = 0
        for stage in self.stages:
            has_prompts = stage.config.sft is not None or stage.name in prompted
            own = max_batch_tokens(stage.config, tokens_per_row, has_prompts)
            needed = max(own, previous)
            if stage.end - stage.start < needed:
                whose = "its own" if own == needed else "the preceding stage's"
                raise ValueError(
                    f"schedule.stages.{stage.name}.num_tokens ({stage.end - stage.start}) must be at least what one "
                    f"global batch can hold ({needed}, {whose}), or a single step would jump over the stage; "
                    "raise num_tokens or lower global_batch_size."
                )
            previous = own

    def _check_rates(self) -> None:
        for stage in self.stages:
            warmup, num_tokens = stage.config.lr_warmup_tokens, stage.end - stage.start
            if not 0 <= warmup < num_tokens:
                raise ValueError(
                    f"schedule.stages.{stage.name}.lr_warmup_tokens ({warmup}) must lie in [0, num_tokens) = "
                    f"[0, {num_tokens}); the warmup ends inside its stage: lower it, or "
                    "lengthen the stage."
                )


def _num_tokens(name: str, stage: StageConfig, epoch_tokens: Mapping[str, int]) -> int:
    """Document tokens of a stage."""
    if stage.num_tokens is not None:
        return stage.num_tokens
    assert stage.num_epochs is not None and name in epoch_tokens, f"stage {name} needs the tokens of an epoch"
    return max(1, round(stage.num_epochs * epoch_tokens[name]))


def max_batch_tokens(stage: StageConfig, tokens_per_row: int, has_prompts: bool) -> int:
    """The most document tokens that one global batch of a stage can hold.

    That is when every row is full and no document stores a clean copy, as documents of one block do not. Prompts and AR
    rows have no noisy copies: a row of them holds as many document tokens as it is long.

    Args:
        stage: of the schedule.
        tokens_per_row: the row's length.
        has_prompts: some tokens carry no loss, as those that come before an answer.
    """
    if has_prompts or stage.ar_row_share:
        return stage.global_batch_size * tokens_per_row
    return stage.global_batch_size * (tokens_per_row // max(stage.num_noisy_copies, 1))


@dataclass(frozen=True)
class RowEstimate:
    """What a row of a stage holds on average, measured by packing a sample of the corpus.

    Attributes:
        document_tokens: document tokens a row consumes.
        forward_tokens: tokens the model sees in a row, padding not counted.
    """

    document_tokens: float
    forward_tokens: float


@dataclass(frozen=True)
class StageRow:
    """One line of the stage table.

    Attributes:
        stage: the stage.
        steps: estimated optimizer steps; None without an estimate of its rows.
        forward_tokens: estimated tokens the model sees; None likewise.
        estimate: of its rows.
    """

    stage: Stage
    steps: int | None
    forward_tokens: int | None
    estimate: RowEstimate | None = None


def stage_table(schedule: BlockSchedule, estimates: Mapping[str, RowEstimate] | None = None) -> list[StageRow]:
    """The schedule as a table, for people to read before a run starts.

    Args:
        schedule: the schedule.
        estimates: by stage name, what a row of the stage holds; without it steps are unknown.

    Returns:
        One line for each stage. The steps are exact if rows hold what was estimated: a
        step that overshoots its stage shortens the next one.
    """
    rows = []
    consumed = 0.0
    for stage in schedule.stages:
        if estimates is None:
            rows.append(StageRow(stage, None, None))
            continue
        estimate, batch = estimates[stage.name], stage.config.global_batch_size
        steps = math.ceil((stage.end - consumed) / (batch * estimate.document_tokens))
        consumed += steps * batch * estimate.document_tokens
        rows.append(StageRow(stage, steps, round(steps * batch * estimate.forward_tokens), estimate))
    return rows


def format_table(rows: Sequence[StageRow]) -> str:
    """The stage table as aligned text, a line of column names first."""
    header = [
        "stage",
        "objective",
        "block_size",
        "tokens",
        "start",
        "end",
        "learning_rate",
        "batch",
        "t",
        "steps",
        "forward_tokens",
    ]
    lines = [header] + [_cells(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _levels(config: StageConfig) -> str:
    """Range, density and order of a stage's noise."""
    start = "" if config.t_max_start is None else f"{config.t_max_start:g}->"
    density = "" if config.t_density == "uniform" else f" {config.t_density}"
    order = f" order {config.order_bias:g}" if config.order_bias else ""
    counts = " resampled" if config.resample_masks else ""
    return f"{config.t_min:g}..{start}{config.t_max:g}{density}{order}{counts}"


def _cells(row: StageRow) -> list[str]:
    stage, config = row.stage, row.stage.config
    rate = f"{config.learning_rate:g}"
    if config.lr_shape != "constant" and config.final_learning_rate is not None:
        rate += f" -> {config.final_learning_rate:g} {config.lr_shape}"
    noise = "-" if config.objective == "ar" else _levels(config)
    if config.num_noisy_copies > 1:
        noise += f" x{config.num_views} {config.view_relation}"
    tokens = f"{stage.end - stage.start:,}" + (f" = {config.num_epochs:g} epochs" if config.num_epochs else "")
    numbers = [tokens, f"{stage.start:,}", f"{stage.end:,}"]
    estimates = ["?" if value is None else f"{value:,}" for value in (row.steps, row.forward_tokens)]
    return [
        stage.name,
        config.objective
        + (f" + ar {config.ar_weight:g}" if config.ar_weight else "")
        + (" + sft" if config.sft is not None else "")
        + (f" + cap {config.cap.coefficient:g}" if config.cap.coefficient else ""),
        f"{config.block_size}" + (f", clean {config.clean_grid}" if config.clean_grid != config.block_size else ""),
        *numbers,
        rate,
        f"{config.global_batch_size}",
        noise,
        *estimates,
    ]

"""A plan as one screen of text: the verdict, memory by rank and part, time by stage, what would be better, sources."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dllm.planning.answer import RankMemory
from megatron_dllm.planning.layout_plan import StagePlan
from megatron_dllm.planning.options import Option
from megatron_dllm.planning.run_plan import RunPlan

GIGA = 1e9
# Parts of a rank's memory, and where the figure comes from.
PARTS = {
    "weights": "formula",
    "gradients": "formula",
    "optimizer": "formula",
    "activations": "formula",
    "head": "formula",
    "reserve": "assumed",
}
# Pipeline ranks that are shown; of more, the first ones, the tightest and the last.
_MOST_RANKS = 8
# Parts of a step's time that are named.
_NAMED_PARTS = 4
_HOURS_PER_DAY = 24.0


def verdict_line(plan: RunPlan, name: str, cluster: str, nodes: int) -> str:
    """The first line: what was planned, whether it fits, and where it is tightest."""
    stage = plan.tightest
    ranks = len(stage.memory)
    place = f"pipeline rank {stage.memory.index(stage.worst) + 1} of {ranks}, stage {stage.work.name}"
    verdict = "fits" if plan.fits else "does not fit"
    gpus = f"{plan.num_gpus} GPUs, {plan.setting.capacity / GIGA:g} GB"
    return (
        f"{name} on {nodes} node{'s' if nodes > 1 else ''} of {cluster} ({gpus}): {verdict}, "
        f"worst rank {plan.peak / GIGA:.1f} of {plan.setting.limit / GIGA:.1f} GB ({place})"
    )


def shortfall(plan: RunPlan) -> str:
    """What a plan that does not fit needs, what takes most of it, and what there is."""
    worst = plan.tightest.worst
    parts = {name: _part(worst, name) for name in PARTS if name != "reserve"}
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"parallel needs {plan.peak / GIGA:.1f} GB on a GPU, the largest part of them {largest} "
        f"({parts[largest] / GIGA:.1f} GB), and the limit is {plan.setting.limit / GIGA:.1f} GB"
    )


def memory_table(plan: RunPlan) -> list[str]:
    """Parameters and GB of each pipeline rank of the tightest stage, a line for each part."""
    stage = plan.tightest
    shown = shown_ranks(stage)
    header = ["memory", *(f"rank {index + 1}" for index in shown), ""]
    lines = [header]
    parameters = [f"{stage.num_parameters[index] / GIGA:.3f}" for index in shown]
    lines.append(["parameters 1e9", *parameters, "formula, exact"])
    for part, source in PARTS.items():
        values = [_part(stage.memory[index], part) for index in shown]
        lines.append([f"{part} GB", *(f"{value / GIGA:.1f}" for value in values), source])
    totals = [f"{stage.memory[index].total / GIGA:.1f}" for index in shown]
    lines.append(["total GB", *totals, ""])
    return aligned(lines)


def shown_ranks(stage: StagePlan) -> list[int]:
    """Indexes of the pipeline ranks that are shown."""
    number = len(stage.memory)
    if number <= _MOST_RANKS:
        return list(range(number))
    chosen = {*range(_MOST_RANKS - 2), stage.memory.index(stage.worst), number - 1}
    return sorted(chosen)


def _part(memory: RankMemory, name: str) -> int:
    return int(getattr(memory, name))


def time_table(plan: RunPlan) -> list[str]:
    """A line for each stage: its step, tokens, days, GPU-hours and cost, and where the time goes."""
    lines = [
        ["stage", "block", "tokens", "step s", "interval", "doc tok/s", "days", "GPU-h", "USD", "where the time goes"]
    ]
    assumptions = plan.setting.machine.assumptions
    for stage in plan.stages:
        seconds = stage.time.total
        block = "ar" if stage.work.config.objective == "ar" else str(stage.work.config.block_size)
        tokens = "?" if stage.work.num_tokens is None else f"{stage.work.num_tokens:.3g}".replace("e+0", "e")
        interval = f"{seconds * assumptions.interval_low:.2f}-{seconds * assumptions.interval_high:.2f}"
        rate = f"{stage.tokens_per_second:,.0f}"
        spent = _spent(plan, stage.hours, stage.gpu_hours)
        lines.append([stage.work.name, block, tokens, f"{seconds:.2f}", interval, rate, *spent, where(stage)])
    lines.append(["total", "", "", "", "", "", *_spent(plan, plan.hours, plan.gpu_hours), ""])
    return aligned(lines)


def _spent(plan: RunPlan, hours: float | None, gpu_hours: float | None) -> list[str]:
    cost = plan.cost_of(gpu_hours)
    return [
        "?" if hours is None else f"{hours / _HOURS_PER_DAY:.2f}",
        "?" if gpu_hours is None else f"{gpu_hours:,.0f}",
        "?" if cost is None else f"{cost:,.0f}",
    ]


def where(stage: StagePlan) -> str:
    """The largest parts of a step, in percent of it."""
    total = stage.time.total
    parts = sorted(stage.time.parts.items(), key=lambda item: -item[1])[:_NAMED_PARTS]
    return ", ".join(f"{name} {100 * value / total:.0f}%" for name, value in parts if value >= 0.01 * total)


def option_lines(plan: RunPlan, options: Sequence[Option]) -> list[str]:
    """What would be better, a line each, as override words."""
    return [f"{option.gain}: {option.words} ({_gain(plan, option)})" for option in options]


def _gain(plan: RunPlan, option: Option) -> str:
    trial = option.trial
    known = [plan.hours, plan.gpu_hours, trial.hours, trial.gpu_hours]
    parts = [f"{trial.peak / GIGA:.1f} GB"]
    if plan.fits and None not in known:
        assert plan.hours and plan.gpu_hours and trial.hours and trial.gpu_hours, "known and positive"
        parts.insert(0, f"{plan.hours / trial.hours:.2f} x as fast, {trial.gpu_hours / plan.gpu_hours:.2f} x GPU-hours")
    return "; ".join(parts)


def source_lines(plan: RunPlan) -> list[str]:
    """Where the numbers come from."""
    assumed = plan.setting.machine.assumptions
    rows = "; ".join(dict.fromkeys(stage.work.row.source for stage in plan.stages))
    fitted = f"calibrated on {assumed.calibrated_on}" if assumed.calibrated_on else "not calibrated: calibrate=[RUN]"
    attention, memory = assumed.attention_efficiency, assumed.memory_efficiency
    return [
        f"rows: {rows}",
        f"time: formula; {assumed.product_efficiency:.2f} of rated products, {assumed.host_ms_per_layer:.1f} ms of the "
        f"host a layer, {assumed.link_efficiency:.2f} of rated links ({fitted});",
        f"      assumed: attention {attention:.2f} of rated products, memory {memory:.2f} of its bandwidth, busiest "
        f"expert rank {assumed.expert_imbalance:g} x the mean",
    ]


def screen(plan: RunPlan, name: str, cluster: str, nodes: int, options: Sequence[Option]) -> str:
    """The whole screen.

    Args:
        plan: of the run.
        name: of the run.
        cluster: name of the cluster's recipe.
        nodes: that it was planned for.
        options: what would be better.
    """
    blocks = [
        [verdict_line(plan, name, cluster, nodes)],
        memory_table(plan),
        time_table(plan),
        option_lines(plan, options),
        source_lines(plan),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other: the first and the last to the left, the others to the right."""
    last = len(lines[0]) - 1
    widths = [max(len(line[column]) for line in lines) for column in range(last + 1)]

    def cell(text: str, column: int) -> str:
        return text.ljust(widths[column]) if column in (0, last) else text.rjust(widths[column])

    return ["  ".join(cell(text, column) for column, text in enumerate(line)).rstrip() for line in lines]

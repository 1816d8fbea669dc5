"""A plan as a picture: memory by pipeline rank and part against the limit, and a step's time by stage and part."""

from __future__ import annotations

import io

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_dllm.planning.run_plan import RunPlan
from megatron_dllm.planning.screen import GIGA, PARTS


def picture(plan: RunPlan) -> bytes:
    """PNG bytes."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _memory(left, plan)
    _time(right, plan)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _memory(axis: Axes, plan: RunPlan) -> None:
    stage = plan.tightest
    ranks = [str(index + 1) for index in range(len(stage.memory))]
    parts = {name: [getattr(memory, name) / GIGA for memory in stage.memory] for name in PARTS}
    _stacked(axis, ranks, parts)
    axis.axhline(plan.setting.limit / GIGA, color="black", ls="--", lw=1)
    axis.set_xlabel("pipeline rank")
    axis.set_ylabel("GB")
    axis.set_title(f"memory in stage {stage.work.name}; dashed: the limit", fontsize=9)


def _time(axis: Axes, plan: RunPlan) -> None:
    names = [stage.work.name for stage in plan.stages]
    times = [stage.time.parts for stage in plan.stages]
    _stacked(axis, names, {part: [time[part] for time in times] for part in times[0]})
    axis.tick_params(axis="x", rotation=60, labelsize=7)
    axis.set_ylabel("seconds of a step")
    axis.set_title("time of a step (formula)", fontsize=9)


def _stacked(axis: Axes, names: list[str], parts: dict[str, list[float]]) -> None:
    """Bars of parts on top of each other, those left out that are 0 everywhere."""
    shown = {name: np.array(values) for name, values in parts.items() if max(values) > 0}
    colors = colormaps["tab10"]
    bottom = np.zeros(len(names))
    for number, (name, values) in enumerate(shown.items()):
        axis.bar(names, values, bottom=bottom, color=colors(number % 10), label=name, width=0.7)
        bottom += values
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.spines["top"].set_visible(False)
    axis.spines["right"].set_visible(False)

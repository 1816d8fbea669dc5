"""The section on decoding: what speed costs each model, over block sizes, rules and their settings.

What was measured lies beside the runs of a chain, in files called study*.json (`megatron_dllm.study`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_dllm.evaluation.study_results import COLUMNS, Confidence, Study, read_studies
from megatron_dllm.reporting.history import History
from megatron_dllm.reporting.markup import figure, table
from megatron_dllm.reporting.pictures import COLORS

PATTERN = "study*.json"
_MARKERS = {"threshold": "o", "factor": "s", "hierarchy": "^", "entropy_bound": "D", "credit": "v"}


def read_study_files(history: History) -> list[Study]:
    """The studies of a chain, in the order of its runs; of models that are no run of it last.

    Raises:
        ValueError: a file is damaged.
    """
    order = {run.name: place for place, run in enumerate(history.runs)}
    found = [study for path in sorted(history.folder.glob(PATTERN)) for study in read_studies(path)]
    return sorted(found, key=lambda study: (order.get(study.name, len(order)), study.name))


def study_section(studies: Sequence[Study]) -> list[str]:
    """The parts of the section; none where nothing was measured."""
    if not studies:
        return []
    caption = (
        "Every point is all questions, decoded in one way; the line joins the points that no other one of the model "
        f"beats. TPF: tokens per forward. {_conditions(studies)}."
    )
    rows = [[study.name, *point.cells()] for study in studies for point in study.front()]
    return ["<h2>Speed of decoding</h2>", figure(picture(studies), caption), table(["model", *COLUMNS], rows)]


def _conditions(studies: Sequence[Study]) -> str:
    """What else decides the numbers: once where it is the same for all, else of every model."""
    if len({study.conditions for study in studies}) == 1:
        return studies[0].conditions
    return "; ".join(f"{study.name}: {study.conditions}" for study in studies)


def picture(studies: Sequence[Study]) -> bytes:
    """Right answers over tokens per forward, and how sure and right each model is by the number of masks. PNG."""
    canvas = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for index, study in enumerate(studies):
        color = COLORS[index % len(COLORS)]
        _draw_points(left, study, color)
        _draw_confidence(right, study, color)
    left.set_xlabel("tokens per forward")
    left.set_ylabel("share of right answers")
    left.set_ylim(0, 1.02)
    right.set_xlabel("masked tokens of the block")
    right.set_ylabel("share of masked tokens")
    right.set_xscale("log", base=2)
    right.set_ylim(0, 1.02)
    for axis in (left, right):
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _draw_points(axis: Axes, study: Study, color: str) -> None:
    for rule, marker in _MARKERS.items():
        points = [point for point in study.points if point.rule == rule]
        if points:
            speeds, shares = zip(*((point.tokens_per_forward, point.accuracy) for point in points), strict=True)
            label = f"{study.name}, {rule}"
            axis.plot(speeds, shares, marker, color=color, ms=4, alpha=0.7, label=label)
    front = study.front()
    axis.plot([point.tokens_per_forward for point in front], [point.accuracy for point in front], color=color, lw=1.2)


def _draw_confidence(axis: Axes, study: Study, color: str) -> None:
    """Shares of sure and of sure and right predictions, at the first block size and the largest threshold up to 0.95.

    Where all thresholds are larger, at the smallest.
    """
    thresholds = sorted({row.threshold for row in study.confidence})
    if not thresholds:
        return
    chosen = next((value for value in reversed(thresholds) if value <= 0.95), thresholds[0])
    size = study.confidence[0].block_size
    rows: list[Confidence] = [row for row in study.confidence if (row.threshold, row.block_size) == (chosen, size)]
    places = [row.num_masked for row in rows]
    sure = [row.num_sure / row.num_tokens for row in rows]
    both = [row.num_sure_and_right / row.num_tokens for row in rows]
    axis.plot(places, sure, "--", color=color, lw=1.2, label=f"{study.name}, above {chosen:g}")
    axis.plot(places, both, "-", color=color, lw=1.4, label=f"{study.name}, and right")

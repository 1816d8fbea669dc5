"""The picture of a test of long contexts: the grid of needles, and the ELBO by position beside it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_dllm.evaluation.by_position import Stretch
from megatron_dllm.evaluation.needle import Cell


def picture(cells: Sequence[Cell], stretches: Sequence[Stretch], num_choices: int) -> bytes:
    """PNG of what was measured; a part that was not is left out."""
    parts = [bool(cells), bool(stretches)]
    canvas = Figure(figsize=(4.8 * sum(parts), 3.4), layout="constrained")
    axes = iter(canvas.subplots(1, sum(parts), squeeze=False)[0])
    if cells:
        _draw_grid(next(axes), cells, num_choices)
    if stretches:
        _draw_curve(next(axes), stretches)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _draw_grid(axis: Axes, cells: Sequence[Cell], num_choices: int) -> None:
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell.depth), lengths.index(cell.length)] = cell.accuracy
    axis.imshow(grid, vmin=0.0, vmax=1.0, cmap="RdYlGn", aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set_xlabel("tokens of context")
    axis.set_ylabel("depth of the needle")
    axis.set_title(f"right of {num_choices} values (chance {1 / num_choices:.2f})", fontsize=10)


def _draw_curve(axis: Axes, stretches: Sequence[Stretch]) -> None:
    middles = [(item.start + item.stop) / 2 for item in stretches]
    errors = [item.standard_error or 0.0 for item in stretches]
    axis.errorbar(middles, [item.nats_per_token for item in stretches], yerr=errors, marker="o", color="#00798c")
    axis.set_xlim(left=0)
    axis.set_xlabel("position in the document (tokens)")
    axis.set_ylabel("nats per token")
    axis.set_title(f"ELBO by position, {stretches[0].num_documents} documents", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)

"""A calibration as text: every measured step beside its predictions, and the words that use the fitted constants."""

from __future__ import annotations

from statistics import median

from megatron_dllm.planning.calibration import Calibration, override_words
from megatron_dllm.planning.screen import GIGA, aligned


def calibration_screen(found: Calibration) -> str:
    """The whole text."""
    lines = [["run and stage", "measured s", "assumed", "fitted", "left out", "peak GB", "formula GB", ""]]
    for judged in found.judged:
        ratios = [_percent(ratio) for ratio in (judged.before, judged.fitted, judged.left_out)]
        peaks = ["-", "-"] if judged.peak is None else [f"{size / GIGA:.1f}" for size in judged.peak]
        lines.append([judged.name, f"{judged.seconds:.3f}", *ratios, *peaks, ""])
    left_out = [abs(judged.left_out - 1.0) for judged in found.judged if judged.left_out is not None]
    before = [abs(judged.before - 1.0) for judged in found.judged]
    fitted = [abs(judged.fitted - 1.0) for judged in found.judged]
    medians = [f"{100 * median(errors):.0f}%" if errors else "-" for errors in (before, fitted, left_out)]
    lines.append(["median error", "", *medians, "", "", ""])
    note = "predicted against measured, by constants as assumed, fitted to all, and fitted to all others (left out);"
    memory = "memory of the fullest rank, as measured and by formula with its reserve"
    return "\n".join([*aligned(lines), "", note, memory, "", f"plan with: {override_words(found.assumptions)}"])


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * (ratio - 1):+.0f}%"

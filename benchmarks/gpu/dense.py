"""A step against what public trainers compute: a dense mask over 2L tokens, the logits of every token, a copy a view.

Forward and backward of the same model with the same weights, without the optimizer, which is the same for both; loss
and gradient norm are checked to agree first (see `benchmarks.step`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.settings import Settings
from benchmarks.gpu.step import BLOCK, LAYERS, VIEWS
from benchmarks.step import Case, throughput_rows

LENGTHS = (4096, 8192)
COLUMNS = (
    "baseline_tokens_s", "ours_tokens_s", "speedup", "baseline_mib", "ours_mib", "memory_ratio", "recomputed_speedup",
    "recomputed_memory_ratio", "difference",
)  # fmt: skip


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """One row for each length."""
    for length in (64,) if settings.is_small else LENGTHS:
        if settings.is_over(0.6):
            yield {"tokens": length, "status": "skipped"}
            continue
        try:
            row = throughput_rows(case_of(settings, length), argparse.Namespace(peak_tflops=None))[0]
        except SystemExit as error:
            yield {"tokens": length, "status": "failed", "why": str(error)[-600:]}
        else:
            yield {"tokens": length, "status": "ok"} | {name: row[name] for name in COLUMNS}


def case_of(settings: Settings, length: int) -> Case:
    """Documents of several lengths, two views; the real model's first layers, or a small one."""
    model, changes = ("attention", {}) if settings.is_small else ("llada2_mini", {"num_layers": LAYERS})
    precision = "bf16" if settings.device == "cuda" else "fp32"
    return Case(
        model,
        length,
        "lognormal",
        BLOCK,
        VIEWS,
        changes=changes,
        device=settings.device,
        precision=precision,
        repeats=2,
    )

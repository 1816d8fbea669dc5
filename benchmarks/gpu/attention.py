"""Attention alone: time per visible pair against the causal kernels, which need no mask, and a dense mask.

Rows are [x_t; x_0], one noisy view and the clean copy, with the heads of Ling-mini-2.0. The goal is a pace of 0.7:
at most 1/0.7 of the time that torch's causal flash kernel takes for as many visible pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.attention import CAUSAL, CAUSAL_FLASH, measure
from benchmarks.gpu.settings import Settings

# (tokens of a row's documents, one document or several, block size; 0: the whole document). Most telling first.
CASES = (
    (8192, "one", 32), (8192, "lognormal", 32), (4096, "lognormal", 32), (16384, "lognormal", 32), (4096, "one", 32),
    (32768, "lognormal", 32), (8192, "lognormal", 512), (8192, "one", 0), (16384, "one", 32), (32768, "one", 32),
    (8192, "one", 512), (4096, "lognormal", 0), (16384, "one", 512), (32768, "one", 0),
)  # fmt: skip
SMALL_CASES = ((128, "one", 32), (128, "lognormal", 0))
# Longer rows are left out with a dense mask: its time is known to grow with the square.
DENSE_LENGTH = 8192


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """One row for each case."""
    is_cuda = settings.device == "cuda"
    heads, groups, head_dim = (2, 1, 16) if settings.is_small else (16, 4, 128)
    for length, documents, block in SMALL_CASES if settings.is_small else CASES:
        if settings.is_over():
            yield {"length": length, "documents": documents, "block": block or length, "status": "skipped"}
            continue
        ours = "flex" if is_cuda else "shared_prefix"
        args = argparse.Namespace(
            backends=[ours, "dense"] if length <= DENSE_LENGTH else [ours],
            dtype="bfloat16" if is_cuda else "float32",
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            repeats=3,
        )
        try:
            measured = measure(args, length, documents, block or length, torch.device(settings.device))
        except torch.cuda.OutOfMemoryError as error:
            yield {
                "length": length,
                "documents": documents,
                "block": block or length,
                "status": "failed",
                "why": str(error)[:200],
            }
            continue
        yield row_of({row["backend"]: row for row in measured}, ours)


def row_of(measured: dict[str, dict[str, Any]], ours: str) -> dict[str, Any]:
    """The backends of one case on one line."""
    own, dense, causal = measured[ours], measured.get("dense"), measured[CAUSAL]
    flash = measured.get(CAUSAL_FLASH)
    return {
        "length": own["length"],
        "documents": own["documents"],
        "block": own["block"],
        "visible share": own["limit"],
        "backend": ours,
        "ms": 1e3 * own["seconds"],
        "TFLOP/s of visible pairs": own["tflops_s"],
        "pace of flash": flash["seconds"] / own["seconds"] if flash else None,
        "pace of torch's choice": causal["seconds"] / own["seconds"],
        "times faster than dense": dense["seconds"] / own["seconds"] if dense else None,
        "peak MiB": own["peak_mib"],
        "dense peak MiB": dense["peak_mib"] if dense else None,
        "ms of first plan": 1e3 * own["plan_seconds"],
    }

"""Files of results as `megatron_dllm.harness` writes them, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SETTINGS = {
    "weights": "runs/sft",
    "code": "0123456",
    "block_size": 32,
    "context_length": 512,
    "likelihood": {"estimator": "auto", "num_views": 8},
    "num_fewshot": 5,
}


def harness_content(acc: float = 0.5, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the file holds: a task with choices, one with texts."""
    quiz = {
        "alias": "quiz",
        "acc,none": acc,
        "acc_stderr,none": 0.1,
        "acc_norm,none": 0.25,
        "acc_norm_stderr,none": 0.1,
    }
    sums = {"exact_match,strict-match": 0.75, "exact_match_stderr,strict-match": "N/A"}
    return {
        "format": 1,
        "settings": SETTINGS | (settings or {}),
        "results": {"quiz": quiz, "sums": sums},
        "versions": {"quiz": 1, "sums": 3},
        "n-samples": {"quiz": {"original": 60, "effective": 40}},
        "texts": {"sums": {"num_tokens": 50, "num_denoising_forwards": 20, "tokens_per_forward": 2.5}},
        "decisions": {"quiz": {"num_questions": 40, "num_unsure": 3, "unsure": []}},
    }


def write_harness(path: Path, **changes: Any) -> Path:
    """Write such a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(harness_content(**changes)))
    return path

"""Which of several evaluated checkpoints is best: only those measured alike are compared.

Pure standard library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_dllm.checkpoint.validation import Validation

METRICS = ("elbo", "bits_per_byte")


@dataclass(frozen=True)
class Ranking:
    """Checkpoints by a measure.

    Attributes:
        block_size: at which they were measured.
        scores: (value, folder), the best first.
        left_out: why the others have no place, by folder.
        reference: the newest measurement; all that are ranked were made under its conditions. None: none was made.
    """

    block_size: int | None
    scores: list[tuple[float, Path]]
    left_out: dict[Path, str]
    reference: Validation | None


def rank(validations: Mapping[Path, Validation], metric: str = "elbo", block_size: int | None = None) -> Ranking:
    """Rank checkpoints measured under the conditions of the newest one's measurement.

    Args:
        validations: by folder, the newest last.
        metric: one of METRICS; lower is better.
        block_size: at which it was measured; None: the newest one's target.
    """
    if not validations:
        return Ranking(block_size, [], {}, None)
    newest = list(validations)[-1]
    reference = validations[newest]
    size = block_size if block_size is not None else reference.target_block_size
    scores: list[tuple[float, Path]] = []
    left_out: dict[Path, str] = {}
    for folder, validation in validations.items():
        difference = validation.difference(reference)
        values = validation.nats_per_token if metric == "elbo" else validation.bits_per_byte
        value = values.get(str(size))
        if difference:
            left_out[folder] = f"it was measured unlike {newest.name}: {difference}"
        elif value is None:
            left_out[folder] = f"it was not measured at block size {size}"
        elif not math.isfinite(value):
            left_out[folder] = f"its {metric} is {value}"
        else:
            scores.append((float(value), folder))
    return Ranking(size, sorted(scores), left_out, reference)

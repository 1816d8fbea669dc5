"""Which corpora are trained on, and in which shares: one prefix, or weights and prefixes in turn.

    data.train=data/web
    data.train=[0.7,data/web,0.3,data/code]

A weight is a share of the document tokens; weights count in proportion, so [7, data/web, 3, data/code] says the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_dllm.config.rules import check

_FORM = "give one prefix, or weights and prefixes in turn: [0.7,data/web,0.3,data/code]"


@dataclass(frozen=True)
class BlendPart:
    """One corpus of a blend.

    Attributes:
        prefix: path of the corpus, without suffix.
        share: of the document tokens; those of a blend add up to 1.
    """

    prefix: str
    share: float


def blend_parts(key: str, value: Any) -> tuple[BlendPart, ...]:
    """The typed form of what a key says.

    Args:
        key: in messages.
        value: a prefix, or a list of weights and prefixes.

    Raises:
        ValueError: it is neither, a weight is not above 0, or a prefix stands there twice.
    """
    if isinstance(value, str):
        return (BlendPart(value, 1.0),)
    is_pairs = isinstance(value, list) and len(value) > 0 and len(value) % 2 == 0
    check(is_pairs, f"{key} ({value}) is not a blend; {_FORM}.")
    weights, prefixes = value[::2], value[1::2]
    for prefix in prefixes:
        check(isinstance(prefix, str), f"{key}: prefix ({prefix}) must be text, weights come first; {_FORM}.")
        check(prefixes.count(prefix) == 1, f"{key}: {prefix} stands there twice; add its weights up.")
    for weight in weights:
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        check(
            is_number and math.isfinite(weight) and weight > 0,
            f"{key}: weight ({weight}) must be a number above 0; {_FORM}.",
        )
    total = sum(weights)
    return tuple(BlendPart(prefix, weight / total) for prefix, weight in zip(prefixes, weights, strict=True))

"""Which gradient norms are too large to apply, and how many steps in a row may be withheld."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SpikeRule:
    """Judges a step by the norms of those before it.

    Attributes:
        factor: a norm above this many times the running median is a spike; 0: none is.
        window: steps of which the median is taken; it is known from half of them on.
        max_skipped: this many steps in a row without one that is applied end a run that skips them: the next ones
            would not be applied either.
    """

    factor: float
    window: int = 101
    max_skipped: int = 10

    def limit(self, grad_norms: Sequence[float]) -> float:
        """Largest gradient norm to apply after steps with these."""
        if self.factor <= 0 or len(grad_norms) < self.window // 2:
            return math.inf
        return self.factor * sorted(grad_norms)[len(grad_norms) // 2]

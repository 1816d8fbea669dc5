"""Which gradient norms count as spikes."""

from __future__ import annotations

import math

from megatron_dllm.training.spikes import SpikeRule


def test_the_limit_is_a_multiple_of_the_median() -> None:
    rule = SpikeRule(factor=3.0, window=6)
    assert rule.limit([1.0, 2.0]) == math.inf, "fewer than half a window tell nothing"
    assert rule.limit([5.0, 1.0, 2.0]) == 6.0
    assert rule.limit([1.0, 2.0, 100.0, 3.0]) == 9.0


def test_no_factor_no_limit() -> None:
    assert SpikeRule(factor=0.0, window=2).limit([1.0] * 9) == math.inf

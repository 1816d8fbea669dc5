"""Which predictions are kept: each rule by hand, and what all of them promise."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig
from megatron_dllm.config.generate import RULES
from megatron_dllm.diffusion.acceptance import accept
from megatron_dllm.diffusion.prediction import Proposals


def proposals(confidence: Tensor, entropy: Tensor) -> Proposals:
    ids = torch.zeros_like(confidence, dtype=torch.int64)
    return Proposals(ids, confidence, entropy, ids, torch.zeros_like(confidence))


def kept(confidence: list[float], masked: str | None = None, entropy: list[float] | None = None, **options: Any) -> str:
    """The places of one block that are kept, as x, for the places marked x in `masked` (None: all)."""
    is_masked = torch.tensor([[mark == "x" for mark in masked or "x" * len(confidence)]])
    found = proposals(torch.tensor([confidence]), torch.tensor([entropy or [0.0] * len(confidence)]))
    return "".join("x" if flag else "." for flag in accept(found, is_masked, DecodingConfig(**options))[0].tolist())


def test_threshold_by_hand() -> None:
    confidence = [0.5, 0.95, 0.7, 0.95]
    assert kept(confidence, threshold=0.6) == ".xxx"
    assert kept(confidence, threshold=0.95) == ".x..", "not above it; the leftmost of equals"
    assert kept(confidence, threshold=0.95, min_tokens_per_step=3) == ".xxx"
    assert kept(confidence, threshold=0.6, min_tokens_per_step=4) == "xxxx"
    assert kept(confidence, threshold=1.0, min_tokens_per_step=9) == "xxxx"
    assert kept(confidence, "x.x.", threshold=0.6) == "..x."


def test_factor_by_hand() -> None:
    # (n + 1)(1 - p_n) < 1 asks for 0.5, 0.667, 0.75, 0.8 of the first four.
    assert kept([0.7, 0.51, 0.9, 0.1], rule="factor") == "x.x."
    assert kept([0.7, 0.76, 0.9, 0.1], rule="factor") == ".xx."
    assert kept([0.81, 0.81, 0.81, 0.81], rule="factor") == "xxxx", "the largest n counts"
    assert kept([0.4, 0.3], rule="factor") == "x."
    assert kept([0.99, 0.6, 0.99], "xx.", rule="factor") == "x.."


def test_hierarchy_by_hand() -> None:
    options = dict(rule="hierarchy", threshold=0.9, low_threshold=0.4)
    assert kept([0.5, 0.6, 0.3, 0.2, 0.41], "xx.xx", **options) == ".x..x", "one of each run"
    assert kept([0.5, 0.95, 0.91, 0.2, 0.3], "xxxxx", **options) == ".xx.."
    assert kept([0.3, 0.2, 0.1, 0.39], "xx.x", **options) == "...x", "none is sure: the best of all"
    assert kept([0.5, 0.5, 0.5], "x.x", **options) == "x.x"


def test_entropy_bound_by_hand() -> None:
    confidence, entropy = [0.9, 0.8, 0.7, 0.6], [0.3, 0.5, 0.2, 0.9]
    # In order, the sum without the largest: 0, 0.3, 0.5, 1.0.
    for bound, expected in ((0.0, "x..."), (0.31, "xx.."), (0.6, "xxx."), (1.1, "xxxx")):
        assert kept(confidence, entropy=entropy, rule="entropy_bound", entropy_bound=bound) == expected
    assert kept(confidence, ".xxx", entropy=entropy, rule="entropy_bound", entropy_bound=0.31) == ".xx."


def _random_block(seed: int) -> tuple[Proposals, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(6, 16, generator=generator)
    is_masked = torch.rand(6, 16, generator=generator) < 0.6
    is_masked[0] = False
    return proposals(confidence, 2 * (1 - confidence)), is_masked


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_makes_progress_among_the_masked_alone(rule: str) -> None:
    strict = DecodingConfig(rule=rule, threshold=1.0, factor=0.0, low_threshold=1.0, entropy_bound=0.0)
    for seed in range(20):
        found, is_masked = _random_block(seed)
        for config in (DecodingConfig(rule=rule), strict, replace(strict, min_tokens_per_step=3)):
            is_kept = accept(found, is_masked, config)
            assert not (is_kept & ~is_masked).any()
            least = is_masked.sum(dim=1).clamp(max=config.min_tokens_per_step)
            assert (is_kept.sum(dim=1) >= least).all()
        assert (accept(found, is_masked, strict).sum(dim=1) <= 1).all()


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_accept_all(rule: str) -> None:
    lax = DecodingConfig(rule=rule, threshold=1e-9, factor=100.0, low_threshold=0.0, entropy_bound=1e9)
    found, is_masked = _random_block(3)
    assert torch.equal(accept(found, is_masked, lax), is_masked)


@pytest.mark.parametrize("rule", RULES)
def test_blocks_do_not_depend_on_one_another(rule: str) -> None:
    found, is_masked = _random_block(4)
    together = accept(found, is_masked, DecodingConfig(rule=rule, threshold=0.8))
    for row in range(len(is_masked)):
        part = slice(row, row + 1)
        alone = proposals(found.confidence[part], found.entropy[part])
        assert torch.equal(accept(alone, is_masked[part], DecodingConfig(rule=rule, threshold=0.8)), together[part])


def test_a_larger_factor_keeps_more() -> None:
    for seed in range(10):
        found, is_masked = _random_block(seed)
        kept = [accept(found, is_masked, DecodingConfig(rule="factor", factor=f)) for f in (0.0, 0.5, 1.0, 2.0, 9.0)]
        assert all(bool((less <= more).all()) for less, more in itertools.pairwise(kept))
        assert kept[0].sum() < kept[-1].sum()


def test_hierarchy_needs_at_most_a_logarithm_of_passes() -> None:
    """Where the surest of a run lies in its middle, every run is halved: n tokens take log2(n + 1) passes."""
    config = DecodingConfig(rule="hierarchy", threshold=1.0, low_threshold=0.4)
    for n in (1, 7, 31):
        is_masked, passes = torch.ones(1, n, dtype=torch.bool), 0
        middle = torch.tensor([[0.9 - 0.01 * _depth(place + 1, n + 1) for place in range(n)]])
        found = proposals(middle, torch.zeros(1, n))
        while is_masked.any():
            is_masked &= ~accept(found, is_masked, config)
            passes += 1
        assert passes == math.log2(n + 1)


def _depth(place: int, size: int) -> int:
    """How often a run of size - 1 places is halved before `place` (from 1 on) is in the middle; size a power of 2."""
    half = size // 2
    return 0 if place == half else 1 + _depth(place % half, half)

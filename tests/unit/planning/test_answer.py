"""What the planner says of a stage: sums of parts, and the rank that needs most."""

from __future__ import annotations

from megatron_dllm.planning.answer import FORMULA, RankAnswer, RankMemory, StageAnswer


def _rank(rank: int, activations: int) -> RankAnswer:
    memory = RankMemory(rank, weights=1, gradients=20, optimizer=300, activations=activations, head=50_000, reserve=6)
    return RankAnswer(memory, num_parameters=1, flops=1, traffic=())


def test_total_adds_every_part() -> None:
    assert _rank(0, 4_000).memory.total == 54_327


def test_worst_is_the_rank_that_needs_most() -> None:
    first, last = _rank(0, 4_000), _rank(7, 3_000)
    assert StageAnswer("warmup", (last, first), FORMULA).worst is first

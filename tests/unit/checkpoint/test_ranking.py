"""Only checkpoints that were measured alike are ranked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_dllm.checkpoint.ranking import rank
from megatron_dllm.checkpoint.validation import Validation
from tests.unit.checkpoint.small_checkpoint import CONDITIONS

A, B, C, D, E = (Path(f"step_{number}") for number in "12345")


def measured(elbo: float, **changes: object) -> Validation:
    conditions = replace(CONDITIONS, **changes)
    return Validation({"32": elbo, "4": elbo - 1}, {"32": -elbo}, 32, conditions)


def test_the_newest_says_what_is_comparable() -> None:
    ranking = rank(
        {
            A: measured(1.0, num_tokens=7),
            B: measured(3.0),
            C: measured(float("nan")),
            D: Validation({"4": 1.0}, {}, 4, CONDITIONS),
            E: measured(2.0),
        }
    )
    assert (ranking.block_size, ranking.scores) == (32, [(2.0, E), (3.0, B)])
    assert ranking.left_out == {
        A: "it was measured unlike step_5: num_tokens 7, not 100",
        C: "its elbo is nan",
        D: "it was not measured at block size 32",
    }
    assert ranking.reference == measured(2.0)


def test_another_metric_and_block_size() -> None:
    found = {A: measured(2.0), B: measured(3.0)}
    assert rank(found, "bits_per_byte").scores == [(-3.0, B), (-2.0, A)]
    assert rank(found, block_size=4).scores == [(1.0, A), (2.0, B)]
    assert rank(found, "bits_per_byte", 4).scores == []


def test_nothing_measured_gives_no_ranking() -> None:
    assert rank({}).scores == [] and rank({}).reference is None

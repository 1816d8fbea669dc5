"""The engine's own answer against real gloo ranks: model state, and the peak of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.ranks import run_ranks
from megatron_dllm.parallel.device import DeviceFacts
from megatron_dllm.planning.answer import RankMemory
from megatron_dllm.planning.engine import measure
from tests.planning_case import LAYOUTS, STAGES, Held, config, hold


def _both(layout_name: str, recompute: str, stage: str) -> list[tuple[Held, RankMemory]]:
    """By rank, what it really held and what the engine said."""
    layout = replace(LAYOUTS[layout_name], recompute=recompute)
    size = 1 if layout_name == "one" else 2
    number = 3 if layout_name == "pipeline" else 2  # as many as the engine runs
    expected = run_ranks(hold, size, layout, stage, number)
    said = [measure(config(), layout, size, rank, stage, DeviceFacts.here()).worst.memory for rank in range(size)]
    return list(zip(expected, said, strict=True))


def _check(layout_name: str, recompute: str, stage: str, tolerance: float = 0.02) -> None:
    for expected, memory in _both(layout_name, recompute, stage):
        assert (memory.weights, memory.gradients) == (expected.weights, expected.gradients)
        assert memory.optimizer == pytest.approx(expected.optimizer, rel=0.001)
        assert memory.activations + memory.head == pytest.approx(expected.activations, rel=tolerance)


@pytest.mark.parametrize("layout", ["pipeline", "tensor_expert"])
def test_engine_says_what_real_ranks_hold(layout: str) -> None:
    _check(layout, "none", "block")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def test_engine_says_what_any_stage_holds_on_any_layout(stage: str, layout: str, recompute: str) -> None:
    _check(layout, recompute, stage)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "pipeline", "tensor_expert"])
@pytest.mark.parametrize("stage", ["block", "mdlm"])
def test_engine_says_what_full_recomputation_holds(stage: str, layout: str) -> None:
    _check(layout, "full", stage, tolerance=0.1)


def test_a_recomputed_step_leaves_nothing_of_its_layers() -> None:
    (held,) = run_ranks(hold, 1, replace(LAYOUTS["one"], recompute="full"), "block", 2)
    one_layer_input = 768 * 64 * 4
    assert held.left < one_layer_input / 4

"""The engine's own answer against real gloo ranks: model state, and the peak of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.ranks import run_ranks
from megatron_dllm.parallel.device import DeviceFacts
from megatron_dllm.planning.engine import distinct_ranks, measure
from tests.planning_case import LAYOUTS, STAGES, Case, config, hold, hold_all

# At full recomputation the engine is a little further off.
TOLERANCES = {"none": 0.02, "selective": 0.02, "full": 0.1}


def _check(layout_name: str, *cases: Case) -> None:
    """Compare what each rank of a layout really holds with what the engine says of those of its pipeline rank."""
    layout = LAYOUTS[layout_name]
    size = 1 if layout_name == "one" else 2
    number = 3 if layout_name == "pipeline" else 2  # as many as the engine runs
    expected = run_ranks(hold_all, size, layout, cases, number, timeout_s=900.0)
    ranks = distinct_ranks(layout, size)
    for index, case in enumerate(cases):
        chosen = replace(layout, recompute=case.recompute)
        said = [measure(config(), chosen, size, rank, case.stage, DeviceFacts.here()).worst.memory for rank in ranks]
        for rank in range(size):
            held, memory = expected[rank][index], said[rank * len(ranks) // size]
            assert (memory.weights, memory.gradients) == (held.weights, held.gradients), case
            assert memory.optimizer == pytest.approx(held.optimizer, rel=0.001), case
            of_step = memory.activations + memory.head
            assert of_step == pytest.approx(held.activations, rel=TOLERANCES[case.recompute]), case


@pytest.mark.parametrize("layout", ["pipeline", "tensor_expert"])
def test_engine_says_what_real_ranks_hold(layout: str) -> None:
    _check(layout, Case("block", "none"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_engine_says_what_any_stage_holds_on_any_layout(layout: str) -> None:
    """A stage is recomputed on every other layout, and a layout recomputes every other stage."""
    first = list(LAYOUTS).index(layout)
    _check(layout, *(Case(stage, ("none", "selective")[(first + index) % 2]) for index, stage in enumerate(STAGES)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "pipeline", "tensor_expert"])
def test_engine_says_what_full_recomputation_holds(layout: str) -> None:
    _check(layout, Case("block", "full"), Case("mdlm", "full"))


def test_a_recomputed_step_leaves_nothing_of_its_layers() -> None:
    (held,) = run_ranks(hold, 1, replace(LAYOUTS["one"], recompute="full"), "block", 2)
    one_layer_input = 768 * 64 * 4
    assert held.left < one_layer_input / 4

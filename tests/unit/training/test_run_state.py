"""Where a run is after one more step."""

from __future__ import annotations

from dataclasses import asdict

import torch

from megatron_dllm.data.loader import GlobalStep
from megatron_dllm.diffusion.losses.step_sums import StepSums
from megatron_dllm.training.run_state import RunState
from megatron_dllm.training.step import StepResult

STEP = GlobalStep([], {"epoch": 1}, num_document_tokens=70, num_forward_tokens=100)
SUMS = StepSums.zeros(torch.device("cpu"))


def result(norm: float, is_applied: bool = True) -> StepResult:
    return StepResult(SUMS, norm, is_applied)


def test_an_applied_step() -> None:
    state = RunState(4, 3, 200, {}, [1.0, 2.0], num_skipped=1).after(STEP, result(3.0), 2, is_stage_end=False)
    assert state == RunState(5, 4, 270, {"epoch": 1}, [2.0, 3.0], num_skipped=0, stage_step=1)


def test_a_skipped_step_consumes_its_rows_and_leaves_the_norms() -> None:
    state = RunState(4, 3, 200, {}, [1.0, 2.0], num_skipped=1).after(STEP, result(9.0, False), 2, is_stage_end=False)
    assert state == RunState(5, 3, 270, {"epoch": 1}, [1.0, 2.0], num_skipped=2, stage_step=1)


def test_norms_and_steps_of_a_stage_end_with_it() -> None:
    state = RunState(grad_norms=[1.0], stage_step=6).after(STEP, result(2.0), 5, is_stage_end=True)
    assert (state.grad_norms, state.stage_step) == ([], 0)


def test_a_state_comes_back_from_json_and_an_older_one_with_defaults() -> None:
    state = RunState(4, 3, 200, {"epoch": 1}, [1.0], num_skipped=2)
    assert RunState.from_json({**asdict(state), "of_another_version": 1}) == state
    assert RunState.from_json({"step": 4}) == RunState(step=4)


def test_what_a_run_has_learned_from_is_remembered_where_a_start_does_without() -> None:
    state = RunState(reference="a", teacher="b")
    assert state.beside("", "") == state
    assert RunState().beside("a", "") == RunState(reference="a")
    assert RunState(reference="a").beside("a", "b") == state

"""Times made with known constants are predicted by a fit to some of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.calibrated import (
    ASSUMED,
    CASES,
    CPU,
    NUM_RANKS,
    Times,
    compared,
    config_of,
    main,
    observation,
    rows_of,
    summary,
)
from megatron_dllm.planning.calibration import machine_of
from megatron_dllm.planning.layout_plan import micro_batches_of

TRUE = replace(ASSUMED, product_efficiency=0.2, host_ms_per_layer=14.0)


def _made(name: str) -> list[Times]:
    """What the true constants say of a case, and a repetition in which something else ran."""
    blank = observation(name, [(1.0, [1.0] * CASES[name].layout.pipeline_model_parallel_size)])
    setting = replace(blank.setting, machine=machine_of(CPU, TRUE))
    each = list(micro_batches_of(setting, blank.work, blank.candidate))
    seconds = blank.predicted(TRUE)
    return [(2 * seconds, [2 * one for one in each]), (seconds, each)]


def test_unseen_cases_are_predicted_where_the_formula_is_right() -> None:
    rows, fitted = rows_of({name: _made(name) for name in CASES}, "wall")
    assert fitted.product_efficiency == pytest.approx(TRUE.product_efficiency, rel=0.05)
    assert fitted.host_ms_per_layer > ASSUMED.host_ms_per_layer
    assert all(abs(float(row["error"].rstrip("%"))) <= 4 for row in rows)
    assert any(abs(float(row["as assumed"].rstrip("%"))) > 15 for row in rows)
    said = summary(rows, fitted)
    num_unseen = len(CASES) - sum(case.is_fitted for case in CASES.values())
    assert f"{num_unseen} of {num_unseen} unseen steps within 15%" in said


def test_in_cpu_time_a_pipeline_has_micro_batches_alone() -> None:
    one = observation("PP2, 1 row", _made("PP2, 1 row"))
    assert [what for what, *_ in compared(one, ASSUMED, "cpu")] == ["micro-batch, rank 1", "micro-batch, rank 2"]
    assert compared(one, ASSUMED, "wall")[0][0] == "step"


def test_every_case_can_be_trained() -> None:
    for case in CASES.values():
        run = config_of(case)
        run.check_layout(case.layout, NUM_RANKS, run.schedule.stages)
        assert case.num_micro_batches >= 1


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"repetitions \(0\) must be positive"):
        main(["--repetitions", "0"])

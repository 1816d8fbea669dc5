"""Constants come back from steps that were made with them; a constant without evidence stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import OptimizerConfig, ParallelConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.planning.calibration import Observation, calibrate, fit, override_words
from megatron_dllm.planning.layout_plan import Candidate, micro_batches_of
from megatron_dllm.planning.observed import read_observations
from megatron_dllm.planning.rows import RowContent
from megatron_dllm.planning.work import StageWork
from tests.unit.config.configs import stage_config
from tests.unit.planning.made_run import write_run
from tests.unit.planning.setting import H100, setting_for

ASSUMED = AssumptionsConfig()
CONFIG = compose_train_config(["model=ling_mini", "run.name=x", "data.train=x"])
TRUE = replace(ASSUMED, product_efficiency=0.35, host_ms_per_layer=9.0, link_efficiency=0.4)


def _observed(name: str, num_gpus: int, length: int = 8192, **sizes: object) -> Observation:
    """A step that takes what the true constants say."""
    layout = replace(ParallelConfig(precision="bf16"), **sizes)
    row = RowContent(length, length / 2, length / 4, length**2 / 4, "")
    work = StageWork(name, stage_config(global_batch_size=64), row, None)
    made = Observation(name, setting_for(CONFIG), work, Candidate(layout, num_gpus), 1.0)
    return replace(made, seconds=made.predicted(TRUE))


RUNS = [
    _observed("long rows", 8, 16384, expert_model_parallel_size=8),
    _observed("short rows", 8, 512, expert_model_parallel_size=8),
    _observed("over the network", 16, expert_model_parallel_size=16),
    _observed("a pipeline", 8, pipeline_model_parallel_size=2, expert_model_parallel_size=4),
]


def test_constants_come_back_from_steps_made_with_them() -> None:
    found = fit(RUNS, ASSUMED)
    for name in ("product_efficiency", "host_ms_per_layer", "link_efficiency"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.1)


def test_what_no_run_tells_stays_as_assumed() -> None:
    found = fit([_observed("alone", 1, 16384)], ASSUMED)
    assert found.link_efficiency == ASSUMED.link_efficiency
    assert found.product_efficiency != ASSUMED.product_efficiency


def test_micro_batches_say_what_hides_in_a_long_step() -> None:
    """A host that updates for minutes leaves nothing to see of products in the whole step."""
    slow, true = (replace(constants, offload_ns=1e3) for constants in (ASSUMED, TRUE))
    made = _observed("offloaded", 8, 16384, expert_model_parallel_size=8)
    setting = replace(made.setting, optimizer=OptimizerConfig(offload="cpu"))
    hidden = replace(made, setting=setting)
    hidden = replace(hidden, seconds=hidden.predicted(true))

    def micro_batch(assumptions: AssumptionsConfig) -> float:
        machine = replace(setting.machine, assumptions=assumptions)
        (seconds,) = micro_batches_of(replace(setting, machine=machine), made.work, made.candidate)
        return seconds

    seen = replace(hidden, micro_batches=(micro_batch(true),))
    assert micro_batch(fit([hidden], slow)) < 0.8 * micro_batch(true)
    assert micro_batch(fit([seen], slow)) == pytest.approx(micro_batch(true), rel=0.15)


def test_each_step_is_judged_by_the_others() -> None:
    found = calibrate(RUNS, ASSUMED, "mine")
    assert all(judged.left_out is not None for judged in found.judged)
    assert max(abs(judged.fitted - 1) for judged in found.judged) < 0.05
    assert max(abs(judged.before - 1) for judged in found.judged) > 0.2
    assert found.assumptions.interval_low <= 1.0 <= found.assumptions.interval_high
    assert override_words(found.assumptions).endswith("assumptions.calibrated_on=mine")
    few = calibrate(RUNS[:2], ASSUMED, "mine")
    assert [judged.left_out for judged in few.judged] == [None, None]
    assert few.assumptions.interval_high == ASSUMED.interval_high


def test_a_run_is_read_without_its_first_steps(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    cluster = ClusterConfig(hardware=H100)
    (found,) = read_observations([str(tmp_path / "run")], cluster, ASSUMED)
    assert (found.name, found.seconds, found.candidate.num_gpus) == ("run one", 3.0, 4)
    assert found.work.row.document_tokens == pytest.approx(3200 / 16)
    assert found.work.row.targets == pytest.approx(1600 / 16)
    assert (found.micro_batches, found.peak) == ((1.5,), 3 * 2**29)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"calibrate \(.*\) must name folders of runs"):
        read_observations([str(tmp_path)], ClusterConfig(hardware=H100), ASSUMED)

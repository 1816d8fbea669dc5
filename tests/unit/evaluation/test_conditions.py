"""Whatever changes what a validation measures changes its conditions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.tiny_run import run_config
from megatron_dllm.config import ParallelConfig
from megatron_dllm.evaluation.conditions import conditions_of
from tests.toy_source import ToySource

CONFIG = run_config(Path("unused"), "run")


class Text(ToySource):
    """Documents with a fingerprint."""

    def __init__(self, fingerprint: str = "a") -> None:
        self.fingerprint = fingerprint


def test_rows_count_only_where_blocks_begin_with_them() -> None:
    text = Text()
    conditions = conditions_of(CONFIG, text, 8)
    wider = replace(CONFIG, schedule=replace(CONFIG.schedule, row_length=4 * CONFIG.schedule.context_length))
    assert conditions_of(wider, text, 8) == conditions
    by_row = replace(CONFIG.data, block_origin="row")
    assert conditions_of(replace(CONFIG, data=by_row), text, 8) != conditions_of(replace(wider, data=by_row), text, 8)


def test_every_setting_of_the_measurement_counts() -> None:
    text = Text()
    found = {
        conditions_of(CONFIG, text, 8),
        conditions_of(CONFIG, text, 9),
        conditions_of(CONFIG, Text("b"), 8),
        conditions_of(replace(CONFIG, schedule=replace(CONFIG.schedule, context_length=64)), text, 8),
        conditions_of(replace(CONFIG, parallel=ParallelConfig(precision="bf16")), text, 8),
        conditions_of(replace(CONFIG, evaluation=replace(CONFIG.evaluation, clean_block_size=1)), text, 8),
    }
    assert len(found) == 6
    assert "t_unit=block" in conditions_of(CONFIG, text, 8).noise

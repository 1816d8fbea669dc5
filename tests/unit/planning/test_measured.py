"""The stages of a run with the rows of its corpus: those that a start of the run finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny_run import run_config, write_corpus
from megatron_dllm.config.plan import PlanConfig
from megatron_dllm.planning.measured import measured_work
from megatron_dllm.training.sources import Sources
from megatron_dllm.training.start import decide_start


def test_rows_and_tokens_are_those_of_a_start(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    config = run_config(tmp_path, "run")
    last = list(config.schedule.stages)[-1]
    epochs = replace(config.schedule.stages[last], num_tokens=None, num_epochs=2.0, lr_warmup_tokens=0)
    schedule = replace(config.schedule, stages={**config.schedule.stages, last: epochs})
    config = PlanConfig(**{**vars(config), "schedule": schedule})
    sources = Sources(config)
    expected = decide_start(config, None, sources)
    (corpus,) = sources.corpora.values()
    found = measured_work(config)
    assert [stage.name for stage in found] == list(config.schedule.stages)
    assert found[-1].num_tokens == 2 * corpus.num_tokens
    for stage, line in zip(found, expected.table, strict=True):
        assert line.steps == pytest.approx(stage.num_tokens / stage.tokens_per_step, abs=1.01)
        assert 0.0 < stage.row.targets <= stage.row.document_tokens <= stage.row.length
    assert not (tmp_path / "runs").exists(), "nothing is written"

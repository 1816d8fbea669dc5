"""What stages that train chats learn from the corpus, and what is refused or said, before a run starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tiny_chats import write_chats, write_pairs
from benchmarks.tiny_run import STAGES, run_config, write_corpus
from megatron_dllm.config import SftConfig, TrainConfig
from megatron_dllm.data.epoch import measure_epoch
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.training.sources import Sources
from megatron_dllm.training.start import Start, decide_start

STAGE = replace(STAGES["decay"], num_tokens=None, num_epochs=2.0, sft=SftConfig(), t_min=0.2, t_max=0.8)


def config_of(folder: Path, **changes: object) -> TrainConfig:
    write_chats(folder / "corpus")
    config = run_config(folder, "sft")
    stages = {"sft": replace(STAGE, **changes)}
    return replace(config, schedule=replace(config.schedule, row_length=160, stages=stages))


def decide(config: TrainConfig) -> Start:
    config.validate(1)
    return decide_start(config, 1, Sources(config))


def test_epochs_are_counted_with_the_fill(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    start = decide(config)
    source = Sources(config).corpora[config.data.train]
    geometry = RowGeometry.of_stage(config.schedule.stages["sft"], config.schedule, config.data)
    one = measure_epoch(source, geometry).num_tokens
    assert start.schedule.total_tokens == 2 * one > 2 * source.num_tokens
    assert start.warnings == ()
    # About 7 more tokens for each of some 2 answers: the table counts them in rows too.
    (row,) = start.table
    assert row.steps is not None and row.forward_tokens is not None and row.forward_tokens > 2 * one


@pytest.mark.parametrize(
    ("sft", "words"),
    [
        (None, "schedule.stages.sft.sft (null) trains the chats of"),
        (SftConfig(turn_boundary="all"), "schedule.stages.sft.sft.turn_boundary (all) shows answers what follows"),
    ],
)
def test_what_is_not_as_at_serving_is_said(sft: SftConfig | None, words: str, tmp_path: Path) -> None:
    (text,) = decide(config_of(tmp_path, sft=sft)).warnings
    assert text.startswith(words)


def test_plain_text_is_no_chats(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    write_corpus(tmp_path / "text")
    config = replace(config, data=replace(config.data, train=str(tmp_path / "text")))
    with pytest.raises(ValueError, match=r"schedule.stages.sft.sft needs chats, and corpus .*text is plain text"):
        decide(config)


def test_text_may_be_trained_in_epochs_too(tmp_path: Path) -> None:
    config = config_of(tmp_path, sft=None, objective="ar", num_views=1, view_relation="stratified", num_epochs=0.5)
    write_corpus(tmp_path / "text")
    config = replace(config, data=replace(config.data, train=str(tmp_path / "text")))
    assert decide(config).schedule.total_tokens == round(0.5 * Sources(config).corpora[config.data.train].num_tokens)


def test_pairs_that_are_trained_as_chats_are_told(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    write_pairs(tmp_path / "pairs", 200)
    config = replace(config, data=replace(config.data, train=str(tmp_path / "pairs")))
    (text,) = decide(config).warnings
    assert text.startswith("schedule.stages.sft.preference (null) trains the rejected answers of") and "pairs" in text

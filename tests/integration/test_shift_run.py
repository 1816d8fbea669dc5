"""A run that keeps its start's shift and opens its mask: resumed, stored, measured, not exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.tiny_run import (
    CONTEXT_LENGTH,
    ROW_LENGTH,
    STAGES,
    checkpoints_of,
    read_metrics,
    read_tensors,
    run_config,
    train_ranks,
    write_corpus,
)
from checkpoints_tools.mcore_to_hf import settle_architecture
from megatron_dllm.checkpoint.identity import check_start
from megatron_dllm.checkpoint.stored_model import read_stored_model
from megatron_dllm.config import AttentionAnnealConfig, EvaluationConfig, ScheduleConfig, TrainConfig
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED

_STAGE = replace(STAGES["warmup"], lr_warmup_tokens=0, shift=True)
SHIFTED = {
    "one": replace(_STAGE, block_size=1, num_tokens=600),
    "four": replace(_STAGE, num_views=2, num_tokens=600),
    # With AR rows among the noisy ones, which stay causal while the mask of the others opens.
    "open": replace(
        _STAGE,
        block_size=CONTEXT_LENGTH,
        num_tokens=1800,
        attention_anneal=AttentionAnnealConfig(steps=4),
        ar_weight=0.5,
        ar_row_share=0.25,
    ),
}


def _config(folder: Path, name: str) -> TrainConfig:
    schedule = ScheduleConfig(context_length=CONTEXT_LENGTH, row_length=ROW_LENGTH, stages=SHIFTED)
    config = run_config(folder, name, schedule=schedule)
    return replace(
        config,
        data=replace(config.data, validation=config.data.train),
        evaluation=EvaluationConfig(block_sizes=[4], num_tokens=200, micro_batch_size=4),
    )


def test_a_shifted_run_from_its_start_to_its_export(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    unbroken, broken = (_config(tmp_path, name) for name in ("unbroken", "broken"))
    assert train_ranks(1, unbroken) == [0]
    expected = read_metrics(unbroken)
    opened = [record["attention_open"] for record in expected if "attention_open" in record]
    assert opened == [min(1.0, (step + 1) / 4) for step in range(len(opened))] and opened[-1] == 1.0
    # The mask is half open where the second run is stopped.
    first_open = next(record["step"] for record in expected if record["stage"] == "open" and "loss" in record)
    assert train_ranks(1, broken, first_open + 2) == [EXIT_PREEMPTED]
    assert train_ranks(1, broken) == [0]
    assert {r["step"]: r["loss"] for r in read_metrics(broken) if "loss" in r} == {
        r["step"]: r["loss"] for r in expected if "loss" in r
    }
    ends = {read_stored_model(folder).meta.position.stage: folder for folder in checkpoints_of(broken).glob("step_*")}
    tensors, whole = (read_tensors(max(checkpoints_of(run).glob("step_*"))) for run in (broken, unbroken))
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    last = read_stored_model(ends["open"])
    assert (last.meta.semantics.shift, last.meta.semantics.block_size) == (True, CONTEXT_LENGTH)
    assert last.meta.is_diffusion and any("validation_elbo/4" in record for record in expected)
    with pytest.raises(
        ValueError, match=r"contract.shift \(true\) with blocks of 32 .* no class that is exported does"
    ):
        settle_architecture(last, None)
    config = _config(tmp_path, "later")
    config.schedule.stages = {"four": replace(_STAGE, shift=None)}
    with pytest.raises(ValueError, match=r"stages.four.shift \(false\) differs from that of the diffusion weights"):
        check_start(ends["open"], config)

"""A run on a blend of three corpora: stopped in mid-chunk and continued, and on another layout, it is the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.tiny_run import (
    checkpoints_of,
    read_metrics,
    read_steps,
    read_tensors,
    run_config,
    train_ranks,
    write_corpus,
)
from megatron_dllm.checkpoint.meta import read_meta
from megatron_dllm.config import TrainConfig
from megatron_dllm.data.spans import MASKABLE, Spans
from megatron_dllm.data.spans_file import write_spans
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED

SHARES = {"web": 0.5, "code": 0.2, "chat": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts, one of them so small that it is repeated, and chats whose second half carries the loss."""
    path = tmp_path_factory.mktemp("blend")
    for seed, (name, num_documents) in enumerate({"web": 200, "code": 12, "chat": 60}.items()):
        write_corpus(path / name, num_documents, seed)
    lengths = np.fromfile(path / "chat.idx", "<i4", 60, offset=34).tolist()
    write_spans(path / "chat.spans", Spans.of_lists([[(n // 2, n, MASKABLE)] for n in lengths]))
    return path


def blended(folder: Path, name: str) -> TrainConfig:
    config = run_config(folder, name)
    train = [value for name, share in SHARES.items() for value in (share, str(folder / name))]
    return replace(config, data=replace(config.data, train=train, packing_chunk=16))


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> TrainConfig:
    config = blended(folder, "unbroken")
    assert train_ranks(1, config) == [0]
    return config


def test_stopped_in_mid_chunk_it_continues_bitwise_and_logs_its_shares(folder: Path, unbroken: TrainConfig) -> None:
    config = blended(folder, "stopped")
    assert train_ranks(1, config, 5) == [EXIT_PREEMPTED]
    assert train_ranks(1, config) == [0]
    tensors, expected = (read_tensors(max(checkpoints_of(run).glob("step_*"))) for run in (config, unbroken))
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert read_metrics(config) == read_metrics(unbroken)
    last = read_steps(unbroken)[-1]
    for name, share in SHARES.items():
        assert last[f"data_share/{name}"] == pytest.approx(share, abs=0.03), "of some 3600 tokens in rows of 50"
    assert last["data_epoch/code"] >= 1 and last["data_epoch/web"] == 0
    records = read_meta(max(checkpoints_of(unbroken).glob("step_*"))).corpora
    assert {record.name: record.share for record in records} == SHARES and len({r.fingerprint for r in records}) == 3


@pytest.mark.slow
def test_two_ranks_train_on_the_same_rows(folder: Path, unbroken: TrainConfig) -> None:
    config = blended(folder, "two_ranks")
    assert train_ranks(2, config, 7) == [EXIT_PREEMPTED] * 2
    assert train_ranks(2, config) == [0, 0]
    names = ("step", "consumed_tokens", "data_fingerprint", *(f"data_share/{name}" for name in SHARES))
    for record, expected in zip(read_metrics(config), read_metrics(unbroken), strict=True):
        assert {name: record.get(name) for name in names} == {name: expected.get(name) for name in names}

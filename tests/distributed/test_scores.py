"""Every layout gives a document the score that one rank gives it, without a loop of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.parity_layouts import LAYOUTS, STAGES, Layout, train_config
from benchmarks.parity_run import write_start
from benchmarks.ranks import run_ranks
from megatron_dllm.config import RunConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.diffusion.roles import DOC
from tests.tiny_batch import tiny_batch

ROWS = [[[40, 20], [57]], [[9], [30, 3, 12]]]


def _batches(config) -> list[Batch]:
    return [
        tiny_batch(config.model, rows, config.schedule.tokens_per_row * 2, block_size=4, seed=index)
        for index, rows in enumerate(ROWS)
    ]


def _score(batch: Batch, outputs: TargetOutputs) -> Tensor:
    return -batch.loss_weights * outputs.nll


def _prepare(folder: str) -> list[list[float]]:
    """Write the weights; the score of every document on one rank, counted one target at a time."""
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.engine import build_chunks

    layout = LAYOUTS["accumulation 4"]
    made = groups.initialize(layout.parallel, RunConfig(name="test"))
    write_start(layout, Path(folder), made)
    config = train_config(layout, STAGES["ar"], Path(folder) / "corpus")
    (model,) = _loaded(build_chunks(config, made), folder)
    expected = []
    for batch, rows in zip(_batches(config), ROWS, strict=True):
        nll, length = model(batch).nll, batch.input_ids.shape[1]
        scores = [[0.0] * len(documents) for documents in rows]
        for place, value, weight in zip(batch.target_positions, nll, batch.loss_weights, strict=True):
            row, column = divmod(int(place), length)
            scores[row][int(batch.roles[row, column, DOC])] -= float(weight) * float(value)
        expected.append([score for row in scores for score in row])
    return expected


def _loaded(chunks, folder: str):
    from megatron_dllm.checkpoint.loading import load_weights

    load_weights(Path(folder) / "start_experts", chunks)
    for chunk in chunks:
        chunk.eval()
    return chunks


def _scores(layout: Layout, folder: str) -> list[list[float]]:
    from megatron_dllm.model.pipeline import score_documents
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.engine import build_chunks

    made = groups.initialize(layout.parallel, RunConfig(name="test"))
    config = train_config(layout, STAGES["ar"], Path(folder) / "corpus")
    chunks = _loaded(build_chunks(config, made), folder)
    found = score_documents(chunks, _batches(config), torch.device("cpu"), made, _score)
    assert all(scores.dtype == torch.float64 and not scores.requires_grad for scores in found)
    return [scores.tolist() for scores in found]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[float]]]:
    folder = str(tmp_path_factory.mktemp("scores"))
    (expected,) = run_ranks(_prepare, 1, folder, timeout_s=300.0)
    assert [len(scores) for scores in expected] == [3, 4]
    assert all(score < 0 for scores in expected for score in scores)
    return folder, expected


@pytest.mark.parametrize("name", ["accumulation 4", "TP2", "PP2", "PP2 virtual 2", "CP2"])
def test_every_rank_knows_the_score_of_its_documents(name: str, start: tuple[str, list[list[float]]]) -> None:
    folder, expected = start
    for found in run_ranks(_scores, LAYOUTS[name].world_size, LAYOUTS[name], folder, timeout_s=300.0):
        for scores, expected_scores in zip(found, expected, strict=True):
            assert scores == pytest.approx(expected_scores, rel=1e-5)

"""Every layout gives a document the score that one rank gives it, view by view."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.parity_layouts import LAYOUTS, STAGES, Layout, train_config
from benchmarks.parity_run import write_start
from benchmarks.ranks import run_ranks
from megatron_dllm.config import RunConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.document_scores import DocumentScores
from megatron_dllm.diffusion.roles import DOC, VIEW
from tests.tiny_batch import tiny_batch

# Two micro-batches of two rows; every document has another length, by which a row is found again.
ROWS = [[[40, 20], [57]], [[9], [30, 3, 12]]]
SAMPLE_IDS = [[71, 4, 12], [9, 2**50 + 1, 33, 5]]
NUM_VIEWS = 2
Scores = dict[int, list[float]]


def _batches(config) -> list[Batch]:
    made = [
        tiny_batch(config.model, rows, config.schedule.tokens_per_row * 2, 4, num_views=NUM_VIEWS, seed=index)
        for index, rows in enumerate(ROWS)
    ]
    return [replace(batch, sample_ids=torch.tensor(ids)) for batch, ids in zip(made, SAMPLE_IDS, strict=True)]


def _prepare(folder: str) -> Scores:
    """Write the weights; the scores of every document on one rank, counted one target at a time."""
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.engine import build_chunks

    layout = LAYOUTS["accumulation 4"]
    made = groups.initialize(layout.parallel, RunConfig(name="test"))
    write_start(layout, Path(folder), made)
    config = train_config(layout, STAGES["ar"], Path(folder) / "corpus")
    (model,) = _loaded(build_chunks(config, made), folder)
    expected: Scores = {id: [0.0] * NUM_VIEWS for ids in SAMPLE_IDS for id in ids}
    for batch, rows, ids in zip(_batches(config), ROWS, SAMPLE_IDS, strict=True):
        nll, length = model.eval()(batch).nll, batch.input_ids.shape[1]
        for place, value, weight in zip(batch.target_positions, nll, batch.loss_weights, strict=True):
            row, column = divmod(int(place), length)
            _, view = (int(batch.roles[row, column, axis]) for axis in (DOC, VIEW))
            document = sum(map(len, rows[:row])) + int(batch.roles[row, column, DOC])
            expected[ids[document]][view - 1] -= float(weight) * float(value)
    return expected


def _loaded(chunks, folder: str):
    from megatron_dllm.checkpoint.loading import load_weights

    load_weights(Path(folder) / "start_experts", chunks)
    return chunks


def _scores(layout: Layout, folder: str) -> DocumentScores:
    from megatron_dllm.evaluation.scores import score_documents
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.engine import build_chunks

    made = groups.initialize(layout.parallel, RunConfig(name="test"))
    config = train_config(layout, STAGES["ar"], Path(folder) / "corpus")
    chunks = _loaded(build_chunks(config, made), folder)
    mine = _batches(config)[made.data.rank() :: made.data.size()]
    found = score_documents(chunks, mine, torch.device("cpu"), made, NUM_VIEWS)
    assert found.by_view.dtype == torch.float64 and not found.by_view.requires_grad
    assert all(chunk.training for chunk in chunks), "the model is left in the mode it was in"
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Scores]:
    folder = str(tmp_path_factory.mktemp("scores"))
    (expected,) = run_ranks(_prepare, 1, folder, timeout_s=300.0)
    assert all(score < 0 for scores in expected.values() for score in scores)
    return folder, expected


@pytest.mark.parametrize("name", ["accumulation 4", "DP2", "TP2", "PP2 virtual 2", "CP2"])
def test_every_rank_knows_the_score_of_every_document(name: str, start: tuple[str, Scores]) -> None:
    folder, expected = start
    ids = [id for of_batch in SAMPLE_IDS for id in of_batch]
    lengths = dict(zip(ids, [n for rows in ROWS for row in rows for n in row], strict=True))
    for found in run_ranks(_scores, LAYOUTS[name].world_size, LAYOUTS[name], folder, timeout_s=300.0):
        assert found.sample_ids.tolist() == sorted(expected)
        assert found.num_maskable.tolist() == [lengths[id] for id in sorted(expected)]
        for id, by_view, mean in zip(found.sample_ids.tolist(), found.by_view, found.means, strict=True):
            assert by_view.tolist() == pytest.approx(expected[id], rel=1e-5)
            assert float(mean) == pytest.approx(sum(expected[id]) / NUM_VIEWS, rel=1e-5)

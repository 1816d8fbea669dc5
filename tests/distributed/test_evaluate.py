"""Every layout measures the validation loss that one rank measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.parity_layouts import LAYOUTS, STAGES, Layout, train_config
from benchmarks.parity_run import write_start
from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import write_corpus
from megatron_dllm.config import EvaluationConfig, RunConfig

NAMES = ["4", "32", "ar"]
SHIFTED = ["1", "4", "32"]


def _prepare(folder: str) -> dict[str, float]:
    from megatron.core import parallel_state

    from megatron_dllm.parallel import groups

    layout = LAYOUTS["accumulation 4"]
    write_corpus(Path(folder) / "corpus", num_documents=300)
    write_start(layout, Path(folder), groups.initialize(layout.parallel, RunConfig(name="test")))
    parallel_state.destroy_model_parallel()
    return _evaluate(layout, folder)


def _evaluate(layout: Layout, folder: str) -> dict[str, float]:
    import torch

    from megatron_dllm.checkpoint.loading import load_weights
    from megatron_dllm.data.corpus import Corpus
    from megatron_dllm.evaluation.elbo import evaluate
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.engine import build_chunks

    made = groups.initialize(layout.parallel, RunConfig(name="test"))
    config = train_config(layout, STAGES["ar"], Path(folder) / "corpus")
    config = replace(config, evaluation=EvaluationConfig(block_sizes=[4, 32], num_tokens=500))
    chunks = build_chunks(config, made)
    load_weights(Path(folder) / "start_experts", chunks)
    corpus = Corpus(config.data.train, config.model)
    found = evaluate(chunks, config, made, corpus, NAMES, torch.device("cpu")).nats_per_token
    shifted = evaluate(chunks, config, made, corpus, SHIFTED, torch.device("cpu"), shift=True).nats_per_token
    return {**found, **{f"shift {name}": value for name, value in shifted.items()}}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, float]]:
    """Folder with a checkpoint, and its losses on one rank."""
    folder = str(tmp_path_factory.mktemp("evaluate"))
    (expected,) = run_ranks(_prepare, 1, folder)
    return folder, expected


@pytest.mark.parametrize("name", ["DP2", "TP2", "PP2 virtual 2", "CP2"])
def test_layouts_measure_what_one_rank_measures(name: str, start: tuple[str, dict[str, float]]) -> None:
    folder, expected = start
    assert expected.keys() == {*NAMES, *(f"shift {size}" for size in SHIFTED)}
    # A token predicted by the slot before it, in blocks of one: the exact NLL of an autoregressive model.
    assert expected["shift 1"] == pytest.approx(expected["ar"], rel=1e-6)
    for nats in run_ranks(_evaluate, LAYOUTS[name].world_size, LAYOUTS[name], folder):
        assert nats == pytest.approx(expected, rel=1e-6)

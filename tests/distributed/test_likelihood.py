"""Every layout gives a continuation the likelihood that one rank gives it, and every rank knows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.parity_layouts import LAYOUTS, STAGES, Layout, train_config
from benchmarks.parity_run import write_start
from benchmarks.ranks import run_ranks
from megatron_dllm.config import RunConfig
from megatron_dllm.config.likelihood import LikelihoodConfig
from megatron_dllm.evaluation.continuations import Continuation

CONTEXT = (5, 7, 11, 13, 17, 19, 23)
# Of a question two choices, of another one three: 1 to 9 tokens, in one block or several.
ASKED = [Continuation(CONTEXT[: 7 - n], tuple(range(3, 4 + 2 * n)), noise_key=n // 2) for n in range(5)]
# Of a third one, choices that share their context.
ASKED += [Continuation(CONTEXT[:5], (token, 4), noise_key=9) for token in (3, 5, 6)]


def _prepare(folder: str) -> list[tuple[float, ...]]:
    from megatron.core import parallel_state

    from megatron_dllm.parallel import groups

    layout = LAYOUTS["accumulation 4"]
    write_start(layout, Path(folder), groups.initialize(layout.parallel, RunConfig(name="test")))
    parallel_state.destroy_model_parallel()
    return _score(layout, folder)


def _score(layout: Layout, folder: str) -> list[tuple[float, ...]]:
    import torch

    from megatron_dllm.checkpoint.loading import load_weights
    from megatron_dllm.evaluation.likelihood import score_continuations
    from megatron_dllm.evaluation.local_model import LocalModel
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.engine import build_chunks

    made = groups.initialize(layout.parallel, RunConfig(name="test"))
    config = train_config(layout, STAGES["ar"], Path(folder) / "corpus")
    config = replace(config, parallel=layout.parallel)
    chunks = build_chunks(config, made)
    load_weights(Path(folder) / "start_experts", chunks)
    model = LocalModel(chunks, config, made, torch.device("cpu"))
    found = score_continuations(model, ASKED, LikelihoodConfig(), 4)
    exact = score_continuations(model, ASKED, LikelihoodConfig(), None)
    return [item.by_view for item in [*found, *exact]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[float, ...]]]:
    folder = str(tmp_path_factory.mktemp("likelihood"))
    (expected,) = run_ranks(_prepare, 1, folder, timeout_s=300.0)
    # Two passes of block diffusion, one of the autoregressive roles.
    assert {len(views) for views in expected[: len(ASKED)]} == {1, 8} and len(expected) == 2 * len(ASKED)
    return folder, expected


@pytest.mark.parametrize("name", ["DP2", "TP2", "PP2", "CP2"])
def test_layouts_score_as_one_rank(name: str, start: tuple[str, list[tuple[float, ...]]]) -> None:
    folder, expected = start
    for found in run_ranks(_score, LAYOUTS[name].world_size, LAYOUTS[name], folder, timeout_s=300.0):
        assert found == [pytest.approx(views, rel=1e-5) for views in expected]

"""The rows of requests have the clean blocks that the measurement asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.tiny_run import run_config
from megatron_dllm.config import EvaluationConfig
from megatron_dllm.config.likelihood import LikelihoodConfig
from megatron_dllm.evaluation.continuations import Continuation, source_of
from megatron_dllm.evaluation.request_rows import request_geometry


def test_clean_blocks_are_those_of_the_evaluation() -> None:
    config = run_config(Path("unused"), "run")
    causal = replace(config, evaluation=EvaluationConfig(block_sizes=[4], clean_block_size=1))
    source = source_of([Continuation((3, 4, 5), (6, 7))], 4, "none", 32, 0)
    grids = [request_geometry(c, LikelihoodConfig(), source, 4, 1).clean_grid for c in (config, causal)]
    assert grids == [4, 1]
    assert request_geometry(causal, LikelihoodConfig(), source, None, 0).clean_block_size is None

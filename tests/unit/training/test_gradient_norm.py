"""The norm of gradients is megatron-core's, to the last digit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.tiny_run import run_config, write_corpus
from megatron_dllm.config import OptimizerConfig, ParallelConfig

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_norm_is_megatrons(tmp_path: Path, offload: str) -> None:
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.gradient_norm import gradient_norm

    write_corpus(tmp_path / "corpus")
    config = run_config(tmp_path, "norm", ParallelConfig(precision="bf16"), optimizer=OptimizerConfig(offload=offload))
    engine = build_engine(config, Groups.current())
    generator = torch.Generator().manual_seed(0)
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    engine.optimizer.prepare_grads()
    number = sum(parameter.numel() for chunk in engine.chunks for parameter in chunk.parameters())
    found = gradient_norm(engine.optimizer)
    assert found == engine.optimizer.get_grad_norm() == pytest.approx(number**0.5, rel=0.05)


def test_a_rank_without_parameters_has_none() -> None:
    from megatron_dllm.training.gradient_norm import local_norm

    assert local_norm([]).tolist() == [0.0]
    assert local_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).tolist() == [5.0]

"""Gradients are divided as megatron-core divides them, and left as they are where a batch has no target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.tiny_run import run_config, write_corpus

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_the_division_is_megatrons(tmp_path: Path, num_tokens: int) -> None:
    from megatron.core.distributed import finalize_model_grads

    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.finalizing import gradient_finalizer

    write_corpus(tmp_path / "corpus")
    engine = build_engine(run_config(tmp_path, "engine"), Groups.current())
    found = []
    for finalize in (finalize_model_grads, gradient_finalizer(Groups.current())):
        generator = torch.Generator().manual_seed(0)
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
            for parameter in chunk.parameters():
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        finalize(engine.chunks, torch.tensor(num_tokens, dtype=torch.int))
        found.append([p.main_grad.clone() for chunk in engine.chunks for p in chunk.parameters()])
    for expected, gradient in zip(*found, strict=True):
        assert torch.equal(gradient, expected)
    largest = max(float(gradient.abs().max()) for gradient in found[1])
    assert largest == pytest.approx(4.0 / max(1, num_tokens), rel=0.5)

"""The optimizer that a rank trains with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tiny_run import run_config, write_corpus
from megatron_dllm.config import OptimizerConfig, ParallelConfig
from tests import planning_case

pytestmark = pytest.mark.usefixtures("one_rank")


def _weights_after(engine: Any, num_steps: int) -> list[Tensor]:
    """The weights after steps on random gradients, from ones."""
    generator = torch.Generator().manual_seed(0)
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(1.0)
    engine.optimizer.reload_model_params()
    for _ in range(num_steps):
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        engine.optimizer.prepare_grads()
        engine.optimizer.step_with_ready_grads()
    return [parameter.detach().clone() for chunk in engine.chunks for parameter in chunk.parameters()]


def test_moments_in_bf16_are_asked_of_megatron(tmp_path: Path) -> None:
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.engine import build_engine, moment_settings, paths_here

    assert moment_settings("fp32") == {}
    settings = moment_settings("bf16")
    assert settings["exp_avg_dtype"] == settings["exp_avg_sq_dtype"] == torch.bfloat16
    assert settings["use_precision_aware_optimizer"] and not settings["store_param_remainders"]
    write_corpus(tmp_path / "corpus")
    config = run_config(tmp_path, "engine")
    short = replace(config, optimizer=replace(config.optimizer, moments="bf16"))
    # megatron-core asks for TransformerEngine, or its version, and so has heard of it.
    with pytest.raises((RuntimeError, TypeError)):
        build_engine(short, Groups.current(), paths_here(config, is_training=True))


def test_the_fused_adam_is_the_same_adam(tmp_path: Path) -> None:
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.engine import build_engine, fuse_adam
    from megatron_dllm.training.parameter_rates import set_learning_rate

    write_corpus(tmp_path / "corpus")
    config = run_config(tmp_path, "engine")
    found = []
    for is_fused in (False, True):
        engine = build_engine(config, Groups.current())
        if is_fused:
            fuse_adam(engine.optimizer)
        set_learning_rate(engine.optimizer, 1e-2)
        found.append(_weights_after(engine, 5))
        groups = [group for part in engine.optimizer.chained_optimizers for group in part.optimizer.param_groups]
        assert groups and all(bool(group["fused"]) == is_fused for group in groups)
    for plain, fused in zip(*found, strict=True):
        assert not torch.equal(plain, torch.ones_like(plain))
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-7)


def test_gradients_in_bf16_are_those_in_fp32_rounded() -> None:
    """Four micro-batches: the loss to the last digit, the gradient to the rounding of their sums."""
    from megatron_dllm.model.objective import objective_of
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.planning.engine_rows import micro_batches
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.loop import embedding_noise
    from megatron_dllm.training.step import train_step

    run = replace(planning_case.config(), parallel=ParallelConfig(precision="bf16"))
    stage = run.schedule.stages["block"]
    batches, objective, noise = micro_batches(run, stage, 4), objective_of(stage, run.noise), embedding_noise(run, 0)
    whole, short = (
        build_engine(replace(run, optimizer=OptimizerConfig(gradients=gradients)), Groups.current())
        for gradients in ("fp32", "bf16")
    )
    short.chunks[0].load_state_dict(whole.chunks[0].state_dict())
    results = []
    for engine in (whole, short):
        engine.optimizer.reload_model_params()
        results.append(train_step(engine, batches, torch.device("cpu"), objective, noise))
    expected, found = results
    assert found.loss == expected.loss and found.is_applied
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=0.02) and found.grad_norm != expected.grad_norm
    sizes = [sum(buffer.grad_data.nbytes for buffer in engine.chunks[0].buffers) for engine in (whole, short)]
    assert sizes[0] == 2 * sizes[1]

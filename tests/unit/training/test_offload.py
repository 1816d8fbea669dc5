"""Adam whose state lies on the host: the ordinary one's weights, and what moves there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tiny_run import run_config, write_corpus
from megatron_dllm.config import OptimizerConfig, ParallelConfig

pytestmark = pytest.mark.usefixtures("one_rank")
PLAIN = OptimizerConfig(lr_multipliers={"*.mlp.*": 0.1, "decoder.layers.2.self_attention.*": 3.0})
OFFLOADED = replace(PLAIN, offload="cpu")
BF16, FP32 = ParallelConfig(precision="bf16"), ParallelConfig()


def _engine(folder: Path, optimizer: OptimizerConfig, layout: ParallelConfig) -> Any:
    """An engine whose weights follow from their shapes alone."""
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.engine import build_engine

    engine = build_engine(run_config(folder, "offload", layout, optimizer=optimizer), Groups.current())
    generator = torch.Generator().manual_seed(1)
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    engine.optimizer.reload_model_params()
    return engine


def _step(engine: Any, number: int) -> float:
    """One update by gradients that follow from its number, clipped as training does; returns their norm."""
    from megatron_dllm.training.parameter_rates import set_learning_rate
    from megatron_dllm.training.step import clip_gradients

    generator = torch.Generator().manual_seed(100 + number)
    engine.optimizer.zero_grad()
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    set_learning_rate(engine.optimizer, 1e-2 / (1 + number))
    engine.optimizer.prepare_grads()
    norm = float(engine.optimizer.get_grad_norm())
    clip_gradients(engine, norm)
    engine.optimizer.step_with_ready_grads()
    return norm


def _weights(engine: Any) -> list[Tensor]:
    return [parameter.detach().float().clone() for chunk in engine.chunks for parameter in chunk.parameters()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offload")
    write_corpus(path / "corpus")
    return path


@pytest.mark.parametrize("layout", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_fifty_steps_are_those_of_the_ordinary_adam(folder: Path, layout: ParallelConfig, fraction: float) -> None:
    expected, found = (
        _engine(folder, PLAIN, layout),
        _engine(folder, replace(OFFLOADED, offload_fraction=fraction), layout),
    )
    begun = _weights(expected)
    for number in range(50):
        assert _step(found, number) == pytest.approx(_step(expected, number), rel=1e-6)
    # What 1e-6 in fp32 may come to once it is rounded to bf16: the neighbouring number.
    tolerance = dict(rtol=1e-6, atol=1e-6) if layout is FP32 else dict(rtol=2**-7, atol=1e-6)
    num_different = 0
    for start, want, got in zip(begun, _weights(expected), _weights(found), strict=True):
        assert not torch.equal(start, want)
        torch.testing.assert_close(got, want, **tolerance)
        num_different += int((got != want).sum())
    assert layout is FP32 or num_different < 1e-3 * sum(weight.numel() for weight in begun)


def test_the_fp32_weights_lie_on_the_host_alone(folder: Path) -> None:
    from megatron_dllm.training.offload import OffloadedAdam

    engine = _engine(folder, OFFLOADED, BF16)
    _step(engine, 0)
    num_parameters = sum(parameter.numel() for chunk in engine.chunks for parameter in chunk.parameters())
    longest = 0
    states = 0
    for part in engine.optimizer.chained_optimizers:
        adam = part.optimizer
        assert isinstance(adam, OffloadedAdam)
        assert all(main is None for group in part.shard_fp32_from_float16_groups for main in group)
        longest += max(parameter.numel() for parameter in adam.offloaded)
        states += len(adam.state)
    host = sum(part.optimizer.host_bytes for part in engine.optimizer.chained_optimizers)
    # 12 bytes a parameter, a step count each, and two lanes of a gradient and a weight.
    assert host == 12 * num_parameters + 4 * states + 2 * 2 * 4 * longest


def test_the_share_is_that_of_the_elements(folder: Path) -> None:
    engine = _engine(folder, replace(OFFLOADED, offload_fraction=0.5), BF16)
    for part in engine.optimizer.chained_optimizers:
        sizes = [p.numel() for group in part.optimizer.param_groups for p in group["params"]]
        offloaded = sum(p.numel() for p in part.optimizer.offloaded)
        assert 0.5 * sum(sizes) <= offloaded <= 0.5 * sum(sizes) + max(sizes)


def test_a_parameter_without_a_gradient_stays(folder: Path) -> None:
    engine = _engine(folder, OFFLOADED, FP32)
    begun = _weights(engine)
    for part in engine.optimizer.chained_optimizers:
        part._init_optimizer_states_with_dummy_values()
        assert len(part.optimizer.state) == sum(len(group["params"]) for group in part.optimizer.param_groups)
    assert all(torch.equal(a, b) for a, b in zip(begun, _weights(engine), strict=True))


def _states(update: Callable[..., None], num_steps: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, generator=generator)
    state = {
        "master_param": weight,
        "exp_avg": torch.zeros(1000),
        "exp_avg_sq": torch.zeros(1000),
        "step": torch.zeros(()),
    }
    group = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(num_steps):
        update([state], [torch.randn(1000, generator=generator)], group)
    return state


@pytest.mark.slow  # compiles DeepSpeed's kernel
def test_deepspeeds_adam_is_torchs() -> None:
    pytest.importorskip("deepspeed", reason="NOT RUN: needs the package deepspeed")
    from megatron_dllm.training.host_adam import deepspeed_update, torch_update

    expected, found = _states(torch_update, 50), _states(deepspeed_update(), 50)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)

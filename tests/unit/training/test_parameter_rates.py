"""Parameter groups with factors: each parameter moves by its own, and megatron-core's rule on weight decay stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tiny_run import run_config
from megatron_dllm.config import OptimizerConfig
from megatron_dllm.config.rates import rate_factor

pytestmark = pytest.mark.usefixtures("one_rank")

TABLE = {"*.mlp.*": 0.1, "*.router.*": 0.0, "decoder.layers.2.self_attention.*": 3.0}


def one_step(folder: Path, multipliers: dict[str, float]) -> tuple[dict[str, tuple[Tensor, Tensor]], Any]:
    """Every parameter before and after a step of Adam whose eps makes it one of the gradient; and the engine."""
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.parameter_rates import _stored_names, set_learning_rate

    optimizer = OptimizerConfig(adam_eps=1e3, weight_decay=0.0, clip_grad=0.0, lr_multipliers=multipliers)
    config = replace(run_config(folder, "rates"), optimizer=optimizer)
    engine = build_engine(config, Groups.current())
    names, generator = _stored_names(config, engine.chunks), torch.Generator().manual_seed(0)
    before = {}
    for parameter in engine.chunks[0].parameters():
        parameter.data.zero_()
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        before[names[id(parameter)]] = parameter.detach().clone()
    engine.optimizer.reload_model_params()
    set_learning_rate(engine.optimizer, 1.0)
    engine.optimizer.prepare_grads()
    engine.optimizer.step_with_ready_grads()
    after = {names[id(parameter)]: parameter.detach().clone() for parameter in engine.chunks[0].parameters()}
    return {name: (before[name], after[name]) for name in after}, engine


def test_every_parameter_moves_by_its_factor(tmp_path: Path) -> None:
    plain, _ = one_step(tmp_path, {})
    tabled, engine = one_step(tmp_path, TABLE)
    factors = {name: rate_factor(name, TABLE) for name in tabled}
    assert set(factors.values()) == {0.0, 0.1, 1.0, 3.0}
    for name, (before, after) in tabled.items():
        moved = plain[name][1] - plain[name][0]
        assert moved.abs().min() > 0.0
        torch.testing.assert_close(after - before, factors[name] * moved, rtol=1e-5, atol=0.0)
        if factors[name] == 0.0:
            assert torch.equal(after, before)
    groups = [group for part in engine.optimizer.chained_optimizers for group in part.optimizer.param_groups]
    assert {group["wd_mult"] for group in groups} == {0.0, 1.0}


def test_factors_of_one_are_the_groups_of_no_table(tmp_path: Path) -> None:
    plain, _ = one_step(tmp_path, {})
    ones, engine = one_step(tmp_path, {"*": 1.0})
    assert all(torch.equal(ones[name][1], plain[name][1]) for name in plain)
    assert {group["lr_mult"] for group in engine.optimizer.param_groups} == {1.0}


def test_names_are_those_of_the_table_of_names(tmp_path: Path) -> None:
    from megatron_dllm.training.rate_rules import parameter_names

    plain, _ = one_step(tmp_path, {})
    assert set(plain) == set(parameter_names(run_config(tmp_path, "rates").model))

"""The checks before a run starts: what runs here passes, and a wrong kernel is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tiny_run import run_config
from megatron_dllm.config import OptimizerConfig, ParallelConfig

pytestmark = pytest.mark.usefixtures("one_rank")
CPU = torch.device("cpu")
KINDS = [torch.float32, torch.bfloat16]


def test_what_runs_here_is_compared(tmp_path: Path) -> None:
    from megatron_dllm.training.engine import paths_here
    from megatron_dllm.training.self_check import check_paths

    layout = ParallelConfig(precision="bf16", moe_token_dispatcher="alltoall")
    config = run_config(tmp_path, "check", layout, optimizer=OptimizerConfig(offload="cpu"))
    assert check_paths(paths_here(config, True), config, CPU) == ["experts", "dispatcher", "optimizer"]
    plain = replace(config, parallel=ParallelConfig(), optimizer=OptimizerConfig())
    assert check_paths(paths_here(plain, True), plain, CPU) == ["experts"]


@pytest.mark.parametrize("dtype", KINDS)
def test_experts_that_mix_up_their_tokens_are_refused(dtype: torch.dtype) -> None:
    from megatron_dllm.model.experts import grouped_experts
    from megatron_dllm.training.self_check import check_experts

    def wrong(rows: Tensor, probs: Tensor, first: Tensor, second: Tensor) -> Sequence[Tensor]:
        return (grouped_experts(rows, probs, torch.tensor([9, 0, 5, 2]), first, second),)

    check_experts(CPU, dtype)
    with pytest.raises(ValueError, match=r"experts \(grouped\): the output is off by .* on cpu"):
        check_experts(CPU, dtype, wrong)


@pytest.mark.parametrize("dtype", KINDS)
def test_a_dispatcher_with_a_wrong_gradient_is_refused(dtype: torch.dtype) -> None:
    from megatron_dllm.training.self_check import check_dispatcher

    class HalfGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad / 2

    def wrong(tokens: Tensor, probs: Tensor) -> Sequence[Tensor]:
        return (HalfGradient.apply(tokens) * probs.sum(dim=1, keepdim=True).to(tokens.dtype),)

    check_dispatcher(CPU, dtype)
    with pytest.raises(ValueError, match=r"dispatcher \(gathers\): the gradient 1 is off"):
        check_dispatcher(CPU, dtype, wrong)


@pytest.mark.parametrize("dtype", KINDS)
def test_a_head_that_is_off_is_refused(dtype: torch.dtype) -> None:
    from megatron_dllm.model.head import nll_gradient
    from megatron_dllm.model.vocabulary_sums import chunk_sums
    from megatron_dllm.training.self_check import check_head

    def short(logits: Tensor, ids: Tensor) -> Sequence[Tensor]:
        return (*chunk_sums(logits, ids)[:3], chunk_sums(logits[:, 1:], ids)[3])

    def doubled(*inputs: Tensor) -> Tensor:
        return 2 * nll_gradient(*inputs)

    check_head(CPU, dtype)
    with pytest.raises(ValueError, match=r"head \(fused\): the NLL is off"):
        check_head(CPU, dtype, sums=short)
    with pytest.raises(ValueError, match=r"head \(fused\): the gradient is off"):
        check_head(CPU, dtype, gradient=doubled)


def test_an_adam_without_bias_correction_is_refused() -> None:
    from megatron_dllm.training.host_adam import State, torch_update
    from megatron_dllm.training.self_check import check_adam

    def wrong(states: Sequence[State], gradients: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        for state in states:
            state["step"] += 100
        torch_update(states, gradients, group)

    check_adam(torch_update, CPU)
    with pytest.raises(ValueError, match=r"optimizer \(Adam\): the weight is off"):
        check_adam(wrong, CPU)

"""One norm over all heads: its formula, and the same where two tensor ranks share the heads."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ranks import run_ranks
from megatron_dllm.config import ParallelConfig, RunConfig
from megatron_dllm.model.heads_norm import HeadsNorm
from megatron_dllm.model.megatron_config import transformer_config
from megatron_dllm.model.paths import choose_paths
from megatron_dllm.parallel.device import DeviceFacts
from megatron_dllm.parallel.groups import initialize
from tests.tiny_models import MODELS

HEADS, FEATURES, EPS = 4, 8, 1e-3


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, n, d] states, [n x d] weight and the gradient [s, b, n, d] of the output."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(5, 2, HEADS, FEATURES, generator=generator),
        1.0 + 0.3 * torch.randn(HEADS * FEATURES, generator=generator),
        torch.randn(5, 2, HEADS, FEATURES, generator=generator),
    )


def _run(ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of states and weight, of this rank's heads."""
    layout = ParallelConfig(tensor_model_parallel_size=ranks)
    groups = initialize(layout, RunConfig(name="norm"))
    model = MODELS["olmoe"]
    config = transformer_config(model, layout, choose_paths(model, layout, DeviceFacts.here()))
    norm = HeadsNorm(config, hidden_size=FEATURES, num_heads=HEADS, tensor_group=groups.tensor, eps=EPS)
    states, weight, grad = _inputs()
    norm.weight.data.copy_(weight)
    mine = states.chunk(ranks, dim=2)[groups.tensor.rank()].clone().requires_grad_()
    output = norm(mine)
    output.backward(grad.chunk(ranks, dim=2)[groups.tensor.rank()])
    assert mine.grad is not None and norm.weight.grad is not None
    return output.detach(), mine.grad, norm.weight.grad


def test_ranks_that_share_the_heads_compute_the_formula() -> None:
    states, weight, grad = _inputs()
    states.requires_grad_()
    weight.requires_grad_()
    flat = states.flatten(-2)
    expected = (flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS) * weight).view_as(states)
    expected.backward(grad)
    for ranks in (1, 2):
        outputs, of_states, of_weight = zip(*run_ranks(_run, ranks, ranks), strict=True)
        torch.testing.assert_close(torch.cat(outputs, dim=2), expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat(of_states, dim=2), states.grad, rtol=1e-5, atol=1e-5)
        # megatron-core sums the gradients of these norms over the tensor ranks.
        torch.testing.assert_close(torch.stack(of_weight).sum(0), weight.grad, rtol=1e-5, atol=1e-5)

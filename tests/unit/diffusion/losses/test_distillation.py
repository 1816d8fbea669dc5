"""The divergence of the likeliest tokens: a bound that becomes the whole KL, with the gradient that is claimed."""

from __future__ import annotations

import pytest
import torch

from megatron_dllm.diffusion.losses.distillation import top_k_divergence


@pytest.mark.parametrize("top_k", [1, 4, 20])
def test_the_likeliest_tokens_bound_the_whole_divergence(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = torch.log_softmax(3.0 * torch.randn(50, 20, generator=generator), -1)
    logits = (2.0 * torch.randn(50, 20, generator=generator)).requires_grad_()
    log_q = torch.log_softmax(logits, -1)
    ids = log_p.topk(top_k, dim=-1).indices
    found, ratio = top_k_divergence(log_p.gather(-1, ids), log_q.gather(-1, ids))
    whole = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert bool((found > -1e-6).all()) and bool((found < whole + 1e-5).all())
    if top_k == 20:
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    p, q = log_p.exp(), log_q.exp()
    expected = (q * (1.0 - ratio.unsqueeze(-1))).scatter(-1, ids, (q - p).gather(-1, ids))
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=1e-4, atol=1e-5)

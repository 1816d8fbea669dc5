"""RMSNorm against its formula, and its mark for sequence parallelism."""

from __future__ import annotations

import pytest
import torch

from megatron_dllm.config import ParallelConfig
from tests.reference_model import tiny_model


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm(one_rank: None, sequence_parallel: bool) -> None:
    from megatron_dllm.model.megatron_config import transformer_config
    from megatron_dllm.model.norm import RMSNorm
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.device import DeviceFacts

    layout = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    model = tiny_model(num_moe_experts=0)
    config = transformer_config(model, layout, choose_paths(model, layout, DeviceFacts.here()))
    norm = RMSNorm(config=config, hidden_size=6, eps=1e-3)
    assert norm.weight.sequence_parallel is sequence_parallel
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6.0))
    hidden = torch.tensor([[1.0, -2.0, 3.0, 0.5, 0.0, 4.0]])
    expected = hidden / torch.sqrt(torch.tensor(30.25 / 6 + 1e-3)) * torch.arange(6.0)
    torch.testing.assert_close(norm(hidden), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_torchs_own(one_rank: None, dtype: torch.dtype) -> None:
    """The backward pass is written by hand on CPU, to keep less; torch's own in fp64 is the reference."""
    from megatron_dllm.model.megatron_config import transformer_config
    from megatron_dllm.model.norm import RMSNorm
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.device import DeviceFacts

    torch.manual_seed(0)
    model, layout = tiny_model(), ParallelConfig()
    config = transformer_config(model, layout, choose_paths(model, layout, DeviceFacts.here()))
    norm = RMSNorm(config=config, hidden_size=8, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
    hidden = torch.randn(3, 5, 2, 8).to(dtype).transpose(0, 1).requires_grad_()
    upstream = torch.randn(5, 3, 2, 8).to(dtype)
    norm(hidden).backward(upstream)

    wide, weight = (x.detach().double().requires_grad_() for x in (hidden, norm.weight))
    expected = torch.nn.functional.rms_norm(wide, (8,), weight, 1e-5)
    expected.backward(upstream.double())
    # fp64 input is computed in fp32 inside, as fp32 input is; bf16 is rounded once at the end.
    close = {"rtol": 8e-3, "atol": 8e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
    for found, wanted in ((norm(hidden), expected), (hidden.grad, wide.grad), (norm.weight.grad, weight.grad)):
        assert found is not None and wanted is not None and found.dtype == dtype
        torch.testing.assert_close(found.detach().double(), wanted.detach(), **close)

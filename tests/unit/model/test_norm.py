"""RMSNorm against its formula, and its mark for sequence parallelism."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_dllm.config import ParallelConfig
from tests.reference_model import tiny_model


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm(one_rank: None, sequence_parallel: bool) -> None:
    from megatron_dllm.model.gpt import transformer_config
    from megatron_dllm.model.norm import RMSNorm

    layout = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    config = transformer_config(replace(tiny_model(num_moe_experts=0)), layout)
    norm = RMSNorm(config=config, hidden_size=6, eps=1e-3)
    assert norm.weight.sequence_parallel is sequence_parallel
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6.0))
    hidden = torch.tensor([[1.0, -2.0, 3.0, 0.5, 0.0, 4.0]])
    expected = hidden / torch.sqrt(torch.tensor(30.25 / 6 + 1e-3)) * torch.arange(6.0)
    torch.testing.assert_close(norm(hidden), expected)

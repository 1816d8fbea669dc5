"""Rotary angles through megatron-core's rotation equal HF's formula."""

from __future__ import annotations

import pytest
import torch

from megatron_dllm.config import ParallelConfig
from tests.reference_model import expected_rotation, tiny_model


@pytest.mark.parametrize("rotary_percent", [0.5, 1.0])
@pytest.mark.parametrize("rotary_base", [10000.0, 600000.0])
def test_rotation_by_positions_equals_hf(one_rank: None, rotary_percent: float, rotary_base: float) -> None:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    from megatron_dllm.model.megatron_config import transformer_config
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.model.rotary import rotary_angles
    from megatron_dllm.parallel.device import DeviceFacts

    model = tiny_model(rotary_percent=rotary_percent, rotary_base=rotary_base)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 300], [5, 4, 3, 2, 1, 0, 511]])
    states = torch.randn(7, 2, 4, model.kv_channels, generator=torch.Generator().manual_seed(0))
    angles = rotary_angles(positions, model.kv_channels, rotary_percent, rotary_base)
    paths = choose_paths(model, ParallelConfig(), DeviceFacts.here())
    turned = apply_rotary_pos_emb(states, angles, transformer_config(model, ParallelConfig(), paths))
    expected = expected_rotation(states.permute(1, 2, 0, 3), positions, model).permute(2, 0, 1, 3)
    torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(turned[0, 0], states[0, 0])  # position 0 is not turned

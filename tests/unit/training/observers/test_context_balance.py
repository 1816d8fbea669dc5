"""Visible pairs per context-parallel rank, as reported."""

from __future__ import annotations

import pytest

from megatron_dllm.data.context_shard import deal_context
from megatron_dllm.diffusion.roles import visible
from megatron_dllm.training.observers.context_balance import row_ratios
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch


@pytest.mark.parametrize("cp_size", [2, 4])
def test_ratios_count_the_pairs_of_the_mask(cp_size: int) -> None:
    batch = tiny_batch(tiny_model(), [[40, 20], [57]], row_length=128, block_size=4)
    expected = []
    for roles, tokens in zip(batch.roles, deal_context(batch, cp_size), strict=True):
        pairs = visible(roles, roles).sum(1)
        loads = pairs[tokens].sum(1).double()
        expected.append(float(loads.max() / loads.mean()))
    assert row_ratios([batch], cp_size) == pytest.approx(expected)
    assert all(ratio >= 1.0 for ratio in expected)

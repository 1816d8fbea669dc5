"""Router load by role."""

from __future__ import annotations

import torch

from megatron_dllm.host import prepare_host
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch

prepare_host()
from megatron_dllm.training.observers.router_load import imbalance, token_roles  # noqa: E402


def test_token_roles_follow_the_order_of_the_router() -> None:
    batch = tiny_batch(tiny_model(), [[3, 2], [4]], row_length=12, block_size=2)
    roles = token_roles(batch).view(12, 2).t()
    masked, visible, clean, padding = 0, 1, 2, 3
    expected = torch.where(batch.is_masked, masked, visible)
    expected[0, 3:6], expected[0, 8:10], expected[0, 10:] = clean, clean, padding
    expected[1, 4:8], expected[1, 8:] = clean, padding
    assert torch.equal(roles, expected)


def test_imbalance_is_the_busiest_expert_over_the_mean() -> None:
    totals = torch.zeros(3, 3, 4)
    totals[1, 0] = torch.tensor([4.0, 0.0, 0.0, 0.0])  # layer 0 is dense: no counts
    totals[2, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0])
    totals[1, 2] = torch.tensor([2.0, 2.0, 4.0, 0.0])
    assert imbalance(totals) == {"masked": 2.5, "clean": 2.0}

"""The reordering of tokens by gathers against megatron-core's own dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import ParallelConfig
from tests.reference_model import random_weights, tiny_model, to_megatron

pytestmark = pytest.mark.usefixtures("one_rank")


def _routing_map(tokens: int, experts: int, copies: int) -> Tensor:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, scores.topk(copies, dim=1).indices, True)


@pytest.mark.parametrize(("tokens", "experts", "copies"), [(0, 4, 2), (1, 4, 4), (7, 5, 1), (50, 16, 4)])
def test_order_is_that_of_megatron(tokens: int, experts: int, copies: int) -> None:
    from megatron.core.transformer.moe.moe_utils import permute

    from megatron_dllm.model.dispatch import CopyOrder, _Permute

    routing_map = _routing_map(tokens, experts, copies)
    hidden, probs = torch.randn(tokens, 3), torch.rand(tokens, experts)
    expected_rows, expected_probs, expected_tokens = permute(hidden, routing_map, probs, tokens * copies)
    order = CopyOrder.of(routing_map, copies)
    rows, copied_probs = _Permute.apply(hidden, probs.gather(1, order.experts), order)
    assert torch.equal(order.tokens, expected_tokens)
    assert torch.equal(rows, expected_rows) and torch.equal(copied_probs, expected_probs)
    assert torch.equal(rows[order.places], hidden.unsqueeze(1).expand(-1, copies, -1))


@pytest.fixture(scope="module")
def layers() -> Any:
    """Two layers of experts with the same weights: with this project's dispatcher, and with megatron-core's."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megatron_dllm.model.dispatch import GatherDispatcher
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import Groups

    model, found = tiny_model(), []
    for _ in range(2):
        built = build_model(model, ParallelConfig(moe_token_dispatcher="alltoall"), Groups.current())
        built.load_state_dict(to_megatron(model, random_weights(model)), strict=False)
        found.append(built.decoder.layers[1].mlp)
    ours, other = found
    assert isinstance(ours.token_dispatcher, GatherDispatcher)
    other.token_dispatcher = MoEAlltoAllTokenDispatcher(
        other.num_local_experts,
        other.local_expert_indices,
        config=other.config,
        pg_collection=get_default_pg_collection(),
    )
    return ours, other


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("tokens", [1, 33])
def test_a_layer_of_experts_computes_the_same(tokens: int, is_grouped: bool, layers: Any) -> None:
    results = []
    for layer in layers:
        layer.experts.is_grouped = is_grouped
        hidden = torch.randn(tokens, 1, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out, _ = layer(hidden)
        weights = torch.linspace(-1.0, 1.0, out.numel()).view_as(out)
        parameters = [value for value in layer.parameters() if value.requires_grad]
        results.append([out, *torch.autograd.grad((out * weights).sum(), [hidden, *parameters])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_copies_of_a_bf16_token_are_added_up_in_fp32() -> None:
    from megatron_dllm.model.dispatch import CopyOrder, _Combine

    order = CopyOrder.of(torch.ones(1, 3, dtype=torch.bool), 3)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert float(_Combine.apply(rows, order)) == 258.0  # one after the other in bf16: 256

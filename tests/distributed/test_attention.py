"""Attention across context-parallel ranks equals attention on one: outputs and every gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.random_roles import CASES, RoleCase, draw_inputs, draw_roles
from benchmarks.ranks import run_ranks
from megatron_dllm.model.attention import dense
from megatron_dllm.model.attention.inputs import AttentionPlanner
from tests.unit.model.attention.eager_kernel import small_backends

# Name: the rows, whether tokens go to ranks by whole noisy blocks (else at random), the backend, and whether
# the noisy keys can stay at home.
DEALS = {
    "whole blocks": (RoleCase(block_size=4), True, "dense", True),
    "two views": (CASES["two views"], True, "shared_prefix", True),
    "two views, chunked": (CASES["two views"], True, "chunked", True),
    "blocks divided": (RoleCase(block_size=4), False, "shared_prefix", False),
    "ar": (CASES["ar"], False, "shared_prefix", False),
    "mdlm divided": (CASES["mdlm"], False, "chunked", False),
    "mdlm": (CASES["mdlm"], True, "chunked", True),
    "two views, flex": (CASES["two views"], True, "flex", True),
    "blocks divided, flex": (RoleCase(block_size=4), False, "flex", False),
}


def deal(roles: Tensor, size: int, by_block: bool, seed: int) -> Tensor:
    """[size, s / size] places of a row's tokens on each rank."""
    generator = torch.Generator().manual_seed(seed)
    if not by_block:
        return torch.randperm(len(roles), generator=generator).view(size, -1)
    room = [len(roles) // size] * size
    ranks: list[list[int]] = [[] for _ in range(size)]
    noisy = [
        torch.nonzero((roles == group).all(-1)).flatten()
        for group in roles.unique(dim=0)
        if group[0] >= 0 and group[2] > 0
    ]
    for tokens in sorted(noisy, key=len, reverse=True):
        rank = max(range(size), key=lambda rank: room[rank] - len(ranks[rank]))
        assert len(tokens) <= room[rank] - len(ranks[rank]), "a block does not fit on a rank"
        ranks[rank].extend(tokens.tolist())
    rest = [place for place in range(len(roles)) if roles[place, 0] < 0 or roles[place, 2] == 0]
    for place in rest:
        ranks[min(range(size), key=lambda rank: len(ranks[rank]))].append(place)
    return torch.tensor(ranks)


def attend_on_a_rank() -> dict[str, tuple[bool, float]]:
    """Per case, whether only clean keys travelled, and the greatest error of this rank's output and gradients."""
    dist.init_process_group("gloo")
    return {name: attend_case(*DEALS[name][:3]) for name in DEALS}


def attend_case(case: RoleCase, by_block: bool, backend: str) -> tuple[bool, float]:
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dllm.model.attention.core import RoleAttention

    rank, size = dist.get_rank(), dist.get_world_size()
    roles = draw_roles(case, 0)
    inputs, grad = draw_inputs(roles, roles)
    expected = dense.attend(*inputs, dense.build_plan(roles, roles), 8**-0.5)
    expected_grads = torch.autograd.grad(expected, inputs, grad)

    places = torch.stack([deal(row, size, by_block, 7)[rank] for row in roles])
    rows = torch.arange(len(roles))

    def take(tensor: Tensor) -> Tensor:
        """[b, n, s, d] to this rank's [s / size, b, n, d]."""
        return tensor.detach().permute(2, 0, 1, 3)[places.T, rows].contiguous()

    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8, attention_dropout=0.0
    )
    layer = RoleAttention(config, 1, AttnMaskType.arbitrary, "self")
    local = [take(tensor).requires_grad_() for tensor in inputs]
    local_roles = roles[rows.unsqueeze(1), places].contiguous()
    shared = AttentionPlanner(small_backends(tile_size=16)[backend], dist.group.WORLD).prepare(local_roles)
    assert shared.exchange is not None
    out = layer(*local, attention_bias=shared).unflatten(-1, (4, 8))
    grads = torch.autograd.grad(out, local, take(grad))
    errors = [
        float((got - take(want)).detach().abs().max())
        for got, want in zip((out, *grads), (expected, *expected_grads), strict=True)
    ]
    return shared.exchange.sent is not None, max(errors)


def test_ranks_equal_one_rank() -> None:
    for found in run_ranks(attend_on_a_rank, 2):
        for name, (only_clean_travelled, error) in found.items():
            assert only_clean_travelled == DEALS[name][3], name
            assert error < 1e-12, name

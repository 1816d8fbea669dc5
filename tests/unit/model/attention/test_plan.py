"""The plan: two intervals per query, and tiles that cover every query once."""

from __future__ import annotations

import pytest
import torch

from benchmarks.random_roles import CASES, draw_roles
from megatron_dllm.diffusion.roles import visible
from megatron_dllm.model.attention.plan import find_intervals
from megatron_dllm.model.attention.tiles import build_tile_plan


@pytest.mark.parametrize("name", CASES)
def test_intervals_are_the_visible_keys(name: str) -> None:
    roles = draw_roles(CASES[name], 0)
    shuffled = roles[:, torch.randperm(roles.shape[1], generator=torch.Generator().manual_seed(0))]
    found = find_intervals(roles, shuffled)
    place = torch.arange(roles.shape[1])
    got = torch.zeros_like(visible(roles, shuffled))
    for start, stop in ((found.own_start, found.own_stop), (found.clean_start, found.clean_stop)):
        got |= (place >= start.unsqueeze(-1)) & (place < stop.unsqueeze(-1))
    expected = visible(roles, torch.stack([row[order] for row, order in zip(shuffled, found.key_order, strict=True)]))
    assert torch.equal(got, expected)


def test_rows_laid_out_document_by_document_are_sorted() -> None:
    roles = draw_roles(CASES["two views"], 0)
    assert find_intervals(roles, roles).is_sorted
    assert not find_intervals(roles, roles.flip(1)).is_sorted


@pytest.mark.parametrize("name", CASES)
def test_tiles_cover_every_query_once_and_stay_small(name: str) -> None:
    roles = draw_roles(CASES[name], 0)
    plan = build_tile_plan(roles, roles, 8)
    assert sorted(plan.query_order.tolist()) == torch.nonzero(roles.reshape(-1, 3)[:, 0] >= 0).flatten().tolist()
    edges = [edge for tile in plan.tiles for edge in tile.queries]
    assert edges[0] == 0 and edges[-1] == len(plan.query_order) and edges[1:-1:2] == edges[2::2]
    for tile in plan.tiles:
        assert tile.mask is None or tile.mask.numel() <= (8 * 3) ** 2


def test_tokens_with_roles_out_of_range_are_refused() -> None:
    roles = torch.tensor([[[0, 0, 1023]]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="view in"):
        find_intervals(roles, roles)

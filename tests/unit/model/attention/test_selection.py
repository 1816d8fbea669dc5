"""Attention of chosen queries only: the same outputs and gradients as among all queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.random_roles import CASES, draw_roles
from megatron_dllm.diffusion.roles import visible
from megatron_dllm.model.attention.selection import num_selected, select_queries, select_roles
from tests.unit.model.attention.eager_kernel import small_backends
from tests.unit.model.attention.test_core import attend, draw


def _draw_rows(roles: Tensor, seed: int = 0) -> Tensor:
    """A third of the tokens, padding among them, in no order."""
    count = roles.shape[0] * roles.shape[1]
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 3]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["dense", "chunked", "shared_prefix", "flex"])
def test_chosen_queries_equal_those_among_all(backend: str, case: str) -> None:
    roles = draw_roles(CASES[case], 0)
    rows = _draw_rows(roles)
    inputs = [tensor.requires_grad_() for tensor in draw(roles)]
    grad = torch.randn(len(rows), 1, 32, generator=torch.Generator().manual_seed(1))
    out = attend(small_backends(tile_size=16)[backend], inputs, roles, rows)
    expected = attend("dense", inputs, roles).flatten(0, 1)[rows].unsqueeze(1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_compiled_kernel_gives_the_same() -> None:
    roles = draw_roles(CASES["two views"], 0)
    rows, inputs = _draw_rows(roles), draw(roles)
    with torch.no_grad():
        got, expected = attend("flex", inputs, roles, rows), attend("dense", inputs, roles, rows)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_compiled_kernels_meet_few_numbers_of_queries() -> None:
    query = torch.randn(40, 2, 3, 4)
    lengths = set()
    for count in range(1, 81):
        chosen = select_queries(query, torch.arange(count), num_selected(count, 80, is_rounded=True))
        assert torch.equal(chosen[:count, 0], query.flatten(0, 1)[:count]) and not chosen[count:].any()
        lengths.add(len(chosen))
    assert len(lengths) == 8 and num_selected(7, 80, is_rounded=False) == 7


def test_documents_of_different_rows_stay_apart() -> None:
    roles = draw_roles(CASES["one view"], 0)
    num_rows, length = roles.shape[:2]
    assert num_rows > 1
    rows = _draw_rows(roles)
    queries, keys = select_roles(roles, roles, rows, len(rows) + 3)
    mask = visible(queries, keys)[0].view(len(rows) + 3, num_rows, length)
    expected = visible(roles, roles)
    for index, row in enumerate(rows.tolist()):
        place, number = divmod(row, num_rows)
        assert torch.equal(mask[index, number], expected[number, place])
        assert mask[index].sum() == expected[number, place].sum()
    assert not mask[len(rows) :].any()

"""The block mask of FlexAttention against the predicate, and its kernel's forward pass on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from benchmarks.random_roles import CASES, draw_inputs, draw_roles
from megatron_dllm.diffusion.roles import visible
from megatron_dllm.model.attention import dense, flex
from tests.unit.model.attention.eager_kernel import run_eagerly


def tiles_of(num: Tensor, indices: Tensor) -> Tensor:
    """[b, 1, r, c] bool from the lists of a block mask."""
    listed = torch.arange(indices.shape[-1]) < num.unsqueeze(-1)
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), listed)


def sorted_mask(plan: flex.FlexPlan, query_roles: Tensor, key_roles: Tensor) -> Tensor:
    """[b, q, k] bool: the predicate, in the order of the plan."""
    rows = []
    for row in range(len(query_roles)):
        queries = query_roles[row] if plan.query_order is None else query_roles[row][plan.query_order[row]]
        keys = key_roles[row] if plan.key_order is None else key_roles[row][plan.key_order[row]]
        rows.append(visible(queries, keys))
    return torch.stack(rows)


@pytest.mark.parametrize("is_shuffled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_block_mask_equals_the_predicate(name: str, is_shuffled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(4):
        keys = queries = draw_roles(CASES[name], seed)
        if is_shuffled:
            keys = keys[:, torch.randperm(keys.shape[1], generator=generator)]
            queries = keys[:, torch.randperm(keys.shape[1], generator=generator)[:50]]
        plan = flex.build_plan(queries, keys, tile_size=16)
        assert (plan.query_order is None) == (not is_shuffled)
        mask = plan.block_mask
        got = create_mask(mask.mask_mod, len(keys), 1, *mask.seq_lengths, device="cpu")[:, 0]
        expected = sorted_mask(plan, queries, keys)
        sees_key = expected.any(-1)
        got = got[:, : queries.shape[1], : keys.shape[1]]
        assert torch.equal(got[sees_key], expected[sees_key])
        assert (got.sum(-1)[~sees_key] == 1).all()
        assert torch.equal(plan.sees_key[:, 0, :, 0], visible(queries, keys).any(-1))
        check_tiles(mask, len(keys))


def check_tiles(mask: BlockMask, num_rows: int) -> None:
    """No tile missed, none listed for nothing, and the full ones are those that torch finds."""
    expected = create_block_mask(mask.mask_mod, num_rows, None, *mask.seq_lengths, device="cpu", BLOCK_SIZE=16)
    for num, indices in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        assert torch.equal(
            tiles_of(getattr(mask, num), getattr(mask, indices)),
            tiles_of(getattr(expected, num), getattr(expected, indices)),
        ), num


@pytest.mark.slow
def test_compiled_forward_equals_dense() -> None:
    """One compilation serves other documents, another order, and rows that are no multiple of a tile."""
    roles = flex._test_roles()[:, :500]
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    for case in (roles, roles[:, order].contiguous(), roles.flip(1).contiguous()):
        inputs, _ = draw_inputs(case, case, head_dim=16, dtype=torch.float32)
        with torch.no_grad():
            got = flex.attend(*inputs, flex.build_plan(case, case), 0.25)
            expected = dense.attend(*inputs, dense.build_plan(case, case), 0.25)
        assert (got - expected).abs().max() < 1e-5
        assert (got.transpose(1, 2)[case[..., 0] < 0] == 0).all()


def test_training_on_the_cpu_is_refused() -> None:
    roles = flex._test_roles()[:, :128]
    inputs, _ = draw_inputs(roles, roles, head_dim=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="no backward on the CPU"):
        flex.attend(*inputs, flex.build_plan(roles, roles), 0.25)


def _with_wrong_key_gradient(query: Tensor, key: Tensor, *others: Any) -> Tensor:
    return run_eagerly(query, key + 0.05 * (key - key.detach()), *others)


def test_start_up_check_notices_a_wrong_gradient() -> None:
    flex.check_gradients("cpu", dtype=torch.float32, head_dim=8, kernel=run_eagerly)
    with pytest.raises(ValueError, match=r"\(flex\): dk is off by 5.0e-02"):
        flex.check_gradients("cpu", dtype=torch.float32, head_dim=8, kernel=_with_wrong_key_gradient)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_on_cuda() -> None:
    flex.check_gradients("cuda")
    flex.check_gradients("cuda", dtype=torch.float32, head_dim=64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_plan_is_built_without_waiting_for_the_device() -> None:
    roles = draw_roles(CASES["two views"], 0).cuda()
    flex.build_plan(roles, roles)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flex.build_plan(roles, roles)
        flex.build_plan(roles[:, :50], roles)
    finally:
        torch.cuda.set_sync_debug_mode("default")

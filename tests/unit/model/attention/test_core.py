"""RoleAttention in megatron's place: layout, backend choice, KV cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from benchmarks.random_roles import CASES, draw_inputs, draw_roles
from megatron_dllm.model.attention.backends import BACKENDS, Backend
from megatron_dllm.model.attention.core import RoleAttention
from megatron_dllm.model.attention.inputs import AttentionPlanner
from megatron_dllm.model.attention.kv_cache import KVCache


def build_layer(selects_rows: bool = False, **config: object) -> RoleAttention:
    settings = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        **({"attention_dropout": 0.0} | config),
    )
    return RoleAttention(settings, 1, AttnMaskType.arbitrary, "self", selects_rows=selects_rows)


def attend(
    backend: str | Backend, tensors: list[Tensor], roles: Tensor, rows: Tensor | None = None, **options: Any
) -> Tensor:
    """query, key, value [s, b, n, d] through one layer; with `rows` [R] only their queries."""
    planner = AttentionPlanner(BACKENDS[backend] if isinstance(backend, str) else backend)
    inputs = planner.prepare(roles, rows=rows, **options)
    return build_layer(selects_rows=rows is not None)(*tensors, attention_bias=inputs)


def draw(roles: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value [s, b, n, d] for roles [b, s, 3]."""
    inputs, _ = draw_inputs(roles, roles, dtype=dtype)
    return [tensor.detach().permute(2, 0, 1, 3).contiguous() for tensor in inputs]


@pytest.mark.parametrize("backend", ["chunked", "shared_prefix"])
def test_output_is_laid_out_like_megatrons(backend: str) -> None:
    roles = draw_roles(CASES["two views"], 0)
    tensors = draw(roles)
    got, expected = attend(backend, tensors, roles), attend("dense", tensors, roles)
    assert got.shape == (roles.shape[1], roles.shape[0], 4 * 8)
    assert (got - expected).abs().max() < 1e-5


def test_scale_is_one_over_the_root_of_the_head_dim() -> None:
    roles = torch.zeros(1, 3, 3, dtype=torch.int32)
    query, key, value = draw(roles)
    expected = torch.softmax(query[:, 0, 3] @ key[:, 0, 1].T / 8**0.5, -1) @ value[:, 0, 1]
    assert (attend("dense", [query, key, value], roles)[:, 0, 24:] - expected).abs().max() < 1e-6


def test_mistakes_are_refused() -> None:
    roles = draw_roles(CASES["one view"], 0)
    query, key, value = draw(roles)
    with pytest.raises(ValueError, match="attention_dropout"):
        build_layer(attention_dropout=0.1)
    with pytest.raises(AssertionError, match="needs the AttentionInputs"):
        build_layer()(query, key, value, None)
    with pytest.raises(AssertionError, match="of other tokens"):
        attend("dense", [query, key, value], roles[:, :-1])
    with pytest.raises(AssertionError, match="without a plan for this layer"):
        attend("dense", [query, key, value], roles, has_plain_layers=False)


@pytest.mark.parametrize("backend", ["dense", "chunked", "shared_prefix"])
@pytest.mark.parametrize("block_size", [4, 80])
def test_kv_cache_stands_for_the_blocks_decoded_before(backend: str, block_size: int) -> None:
    """Rows at different places, block by block with the cache, equal one pass of each over everything."""
    cache = KVCache()
    num_kept = (2, 1, 0)  # blocks in front of the noisy one
    wholes = [_row(number, block_size) for number in num_kept]
    tensors = [draw(whole) for whole in wholes]
    with torch.no_grad():
        expected = [attend(backend, parts, whole) for parts, whole in zip(tensors, wholes, strict=True)]
        places = [0, 0, 0]
        for _ in range(3):
            roles = torch.cat(
                [whole[:, place : place + block_size] for whole, place in zip(wholes, places, strict=True)]
            )
            positions = torch.tensor(places).unsqueeze(1) + torch.arange(block_size)
            now = [
                torch.cat(
                    [parts[kind][place : place + block_size] for parts, place in zip(tensors, places, strict=True)], 1
                )
                for kind in range(3)
            ]
            got = attend(backend, now, roles, cached=cache.open(1, positions, roles))
            for row, place in enumerate(places):
                wanted = expected[row][place : place + block_size, 0]
                assert (got[:, row] - wanted).abs().max() < 1e-5
            places = [
                min(place + block_size, number * block_size) for place, number in zip(places, num_kept, strict=True)
            ]


def _row(num_kept: int, block_size: int) -> Tensor:
    """[1, (num_kept + 1) * block_size, 3] roles of clean blocks and a noisy one behind them."""
    block = torch.arange((num_kept + 1) * block_size) // block_size
    return torch.stack([torch.zeros_like(block), block, (block == num_kept).long()], -1).int().unsqueeze(0)


def test_kv_cache_copies_the_beginning_of_a_slot() -> None:
    whole = _row(2, 4)
    tensors, positions = draw(whole), torch.arange(12).unsqueeze(0)
    cache = KVCache()
    with torch.no_grad():
        expected = attend("dense", tensors, whole)
        first = slice(0, 8)
        attend(
            "dense",
            [part[first] for part in tensors],
            whole[:, first],
            cached=cache.open(0, positions[:, first], whole[:, first]),
        )
        cache.open(2, positions[:, :1], torch.full((1, 1, 3), -1, dtype=torch.int32))
        cache.copy(0, 2, 8)
        noisy = slice(8, 12)
        cached = cache.open(2, positions[:, noisy], whole[:, noisy])
        got = attend("dense", [part[noisy] for part in tensors], whole[:, noisy], cached=cached)
    assert (got - expected[noisy]).abs().max() < 1e-5


def test_a_growing_number_of_keys_is_not_compiled_for() -> None:
    """Every block that is decoded adds keys: flex would compile each time."""
    planner = AttentionPlanner(BACKENDS["flex"])
    for length, start, expected in ((4, 0, "dense"), (4, 8, "dense"), (100, 0, "chunked"), (600, 8, "chunked")):
        roles = torch.zeros(1, length, 3, dtype=torch.int32)
        positions = torch.arange(start, start + length).unsqueeze(0)
        cached = KVCache().open(0, positions, roles)
        assert planner.prepare(roles, cached=cached).backend is BACKENDS[expected]
    assert planner.prepare(roles, has_plain_layers=False).backend is BACKENDS["flex"]

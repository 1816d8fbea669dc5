"""RoleAttention in megatron's place: layout, backend choice, KV cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dllm.model.attention.backends import BACKENDS, Backend
from megatron_dllm.model.attention.core import RoleAttention
from megatron_dllm.model.attention.inputs import AttentionPlanner
from megatron_dllm.model.attention.kv_cache import KVCache
from tests.unit.model.attention.random_roles import CASES, draw_inputs, draw_roles


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
def test_kv_cache_stands_for_the_blocks_decoded_before(backend: str) -> None:
    """Block by block with the cache, a row's longer prompt included, equals one pass over everything."""
    clean = torch.stack([torch.zeros(12), torch.arange(12) // 4, torch.zeros(12)], -1).int().repeat(2, 1, 1)
    clean[1, :2, 0] = -1
    noisy = clean[:, 8:].clone()
    noisy[..., 2] = 1
    together = torch.cat([clean, noisy], dim=1)
    tensors = draw(together)
    cache = KVCache()
    with torch.no_grad():
        expected = attend(backend, tensors, together)
        for place in (slice(0, 4), slice(4, 8)):
            roles = clean[:, place].contiguous()
            done = cache.open(roles, is_committing=True)
            got = attend(backend, [tensor[place] for tensor in tensors], roles, cached=done)
            cache.store(done)
            assert (got - expected[place]).abs().max() < 1e-5
        assert len(cache) == 8
        for _ in range(2):
            got = attend(backend, [tensor[12:] for tensor in tensors], noisy, cached=cache.open(noisy))
            assert (got - expected[12:]).abs().max() < 1e-5
            assert len(cache) == 8


def test_kv_cache_stores_clean_tokens_only() -> None:
    roles = draw_roles(CASES["one view"], 0)
    cache = KVCache()
    with pytest.raises(ValueError, match="only clean tokens"):
        cache.open(roles, is_committing=True)
    done = cache.open(roles)
    attend("dense", draw(roles), roles, cached=done)
    with pytest.raises(AssertionError, match="opened to be stored"):
        cache.store(done)
    assert len(cache) == 0


def test_a_growing_number_of_keys_is_not_compiled_for() -> None:
    """Every block that is decoded adds keys: flex would compile each time."""
    roles = torch.zeros(1, 4, 3, dtype=torch.int32)
    planner = AttentionPlanner(BACKENDS["flex"])
    assert planner.prepare(roles, cached=KVCache().open(roles)).backend is BACKENDS["chunked"]
    assert planner.prepare(roles, has_plain_layers=False).backend is BACKENDS["flex"]

"""RoleAttention in megatron's place: layout, backend choice, KV cache."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dllm.model.attention import core
from megatron_dllm.model.attention.core import RoleAttention, choose_backend
from megatron_dllm.model.attention.kv_cache import KVCache
from tests.unit.model.attention.random_roles import CASES, draw_inputs, draw_roles


def build_layer(backend: str = "auto", **config: object) -> RoleAttention:
    one = SimpleNamespace(size=lambda: 1)
    settings = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        **({"attention_dropout": 0.0} | config),
    )
    return RoleAttention(
        settings, 1, AttnMaskType.arbitrary, "self", pg_collection=SimpleNamespace(tp=one, cp=one), backend=backend
    )


def draw(roles: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key, value [s, b, n, d] for roles [b, s, 3]."""
    inputs, _ = draw_inputs(roles, roles, dtype=dtype)
    return [tensor.detach().permute(2, 0, 1, 3).contiguous() for tensor in inputs]


@pytest.mark.parametrize("backend", ["auto", "chunked", "shared_prefix"])
def test_output_is_laid_out_like_megatrons(backend: str) -> None:
    roles = draw_roles(CASES["two views"], 0)
    query, key, value = draw(roles)
    got = build_layer(backend)(query, key, value, roles)
    expected = build_layer("dense")(query, key, value, roles)
    assert got.shape == (roles.shape[1], roles.shape[0], 4 * 8)
    assert (got - expected).abs().max() < 1e-5


def test_scale_is_one_over_the_root_of_the_head_dim() -> None:
    roles = torch.zeros(1, 3, 3, dtype=torch.int32)
    query, key, value = draw(roles)
    expected = torch.softmax(query[:, 0, 3] @ key[:, 0, 1].T / 8**0.5, -1) @ value[:, 0, 1]
    assert (build_layer("dense")(query, key, value, roles)[:, 0, 24:] - expected).abs().max() < 1e-6


def test_choice_says_why_and_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_logged_choices", set())
    with caplog.at_level(logging.INFO):
        assert choose_backend("auto", "cpu") == ("shared_prefix", "fastest on CPU")
        choose_backend("auto", "cpu")
    assert len(caplog.records) == 1 and "shared_prefix" in caplog.text
    assert choose_backend("dense", "cpu") == ("dense", "asked for by name")
    assert choose_backend("auto", "meta")[0] == "chunked"


def test_mistakes_are_refused() -> None:
    roles = draw_roles(CASES["one view"], 0)
    query, key, value = draw(roles)
    with pytest.raises(ValueError, match="is not known"):
        build_layer("flash")
    with pytest.raises(ValueError, match="attention_dropout"):
        build_layer(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_mask \(None\)"):
        build_layer()(query, key, value, None)
    with pytest.raises(ValueError, match="integer roles"):
        build_layer()(query, key, value, roles[:, :-1])
    with pytest.raises(ValueError, match="kernel of the CPU"):
        choose_backend("shared_prefix", "cuda")


@pytest.mark.parametrize("backend", ["dense", "chunked", "shared_prefix"])
def test_kv_cache_stands_for_the_blocks_decoded_before(backend: str) -> None:
    """Block by block with the cache, a row's longer prompt included, equals one pass over everything."""
    clean = torch.stack([torch.zeros(12), torch.arange(12) // 4, torch.zeros(12)], -1).int().repeat(2, 1, 1)
    clean[1, :2, 0] = -1
    noisy = clean[:, 8:].clone()
    noisy[..., 2] = 1
    together = torch.cat([clean, noisy], dim=1)
    query, key, value = draw(together)
    layer, cache = build_layer(backend), KVCache()
    with torch.no_grad():
        expected = layer(query, key, value, together)
        for place in (slice(0, 4), slice(4, 8)):
            with cache.attached(layer, is_committing=True):
                got = layer(query[place], key[place], value[place], clean[:, place].contiguous())
            assert (got - expected[place]).abs().max() < 1e-5
        assert len(cache) == 8
        for _ in range(2):
            with cache.attached(layer):
                got = layer(query[12:], key[12:], value[12:], noisy)
            assert (got - expected[12:]).abs().max() < 1e-5
            assert len(cache) == 8
    assert layer.kv_cache is None


def test_kv_cache_stores_clean_tokens_only() -> None:
    roles = draw_roles(CASES["one view"], 0)
    query, key, value = draw(roles)
    layer, cache = build_layer(), KVCache()
    with cache.attached(layer):
        layer(query, key, value, roles)
    with pytest.raises(ValueError, match="only clean tokens"), cache.attached(layer, is_committing=True):
        layer(query, key, value, roles)
    assert len(cache) == 0
    with pytest.raises(ValueError, match="no RoleAttention"), cache.attached(torch.nn.Linear(1, 1)):
        pass

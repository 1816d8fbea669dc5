"""Rotary angles through megatron-core's rotation equal HF's formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import ParallelConfig, RotaryScalingConfig
from megatron_dllm.config.rotary_scaling import KINDS
from megatron_dllm.model.rotary import rotary_angles, rotary_frequencies
from tests.reference_model import expected_rotation, tiny_model


@pytest.mark.parametrize("rotary_percent", [0.5, 1.0])
@pytest.mark.parametrize("rotary_base", [10000.0, 600000.0])
def test_rotation_by_positions_equals_hf(one_rank: None, rotary_percent: float, rotary_base: float) -> None:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    from megatron_dllm.model.megatron_config import transformer_config
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.device import DeviceFacts

    model = tiny_model(rotary_percent=rotary_percent, rotary_base=rotary_base)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 300], [5, 4, 3, 2, 1, 0, 511]])
    states = torch.randn(7, 2, 4, model.kv_channels, generator=torch.Generator().manual_seed(0))
    angles = rotary_angles(positions, model.kv_channels, rotary_percent, rotary_base)
    paths = choose_paths(model, ParallelConfig(), DeviceFacts.here())
    turned = apply_rotary_pos_emb(states, angles, transformer_config(model, ParallelConfig(), paths))
    expected = expected_rotation(states.permute(1, 2, 0, 3), positions, model).permute(2, 0, 1, 3)
    torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(turned[0, 0], states[0, 0])  # position 0 is not turned


LING = dict(num_features=64, base=6e5)
QWEN3 = dict(num_features=128, base=1e6)
STRETCHED = {
    "yarn": RotaryScalingConfig(factor=4.0, original_max_position_embeddings=32768),
    "yarn, other ramp": RotaryScalingConfig(
        factor=2.0, original_max_position_embeddings=4096, beta_fast=20.0, beta_slow=2.0, attention_factor=1.3
    ),
    "llama3": RotaryScalingConfig("llama3", 8.0, 8192),
    "ntk": RotaryScalingConfig("ntk", 4.0, 32768),
}


def _frequencies_of_transformers(scaling: RotaryScalingConfig, num_features: int, base: float) -> tuple[Tensor, float]:
    """By transformers, of heads twice as wide as what turns where that is 64."""
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    keys = {"yarn": ("beta_fast", "beta_slow", "attention_factor"), "llama3": ("low_freq_factor", "high_freq_factor")}[
        scaling.kind
    ]
    rope = {key: getattr(scaling, key) for key in ("factor", "original_max_position_embeddings", *keys)}
    rope |= {"rope_type": scaling.kind, "rope_theta": base, "partial_rotary_factor": num_features / 128}
    return ROPE_INIT_FUNCTIONS[scaling.kind](Qwen3Config(head_dim=128, rope_parameters=rope), torch.device("cpu"))


@pytest.mark.parametrize("model", [LING, QWEN3], ids=["ling", "qwen3"])
@pytest.mark.parametrize("name", [name for name in STRETCHED if name != "ntk"])
def test_stretched_frequencies_are_those_of_transformers(name: str, model: dict[str, Any]) -> None:
    expected, temperature = _frequencies_of_transformers(STRETCHED[name], **model)
    assert torch.equal(rotary_frequencies(scaling=STRETCHED[name], **model), expected)
    assert STRETCHED[name].temperature == pytest.approx(temperature, rel=1e-12)


def test_yarn_slows_the_pairs_that_turn_seldom() -> None:
    """By hand for Ling: pairs up to 12 keep their frequency, from 21 on they take the whole factor."""
    ratio = rotary_frequencies(scaling=STRETCHED["yarn"], **LING) / rotary_frequencies(**LING)
    assert torch.equal(ratio[:13], torch.ones(13)) and bool((ratio[13:21] < 1).all())
    torch.testing.assert_close(ratio[21:], torch.full((11,), 0.25), rtol=1e-6, atol=0)
    assert bool((ratio[12:21] > 0.25).all())
    assert STRETCHED["yarn"].temperature == pytest.approx(1.138629, abs=1e-6)
    assert replace(STRETCHED["yarn"], factor=2.0).temperature == pytest.approx(1.069315, abs=1e-6)


@pytest.mark.parametrize(
    ("factor", "ahead", "num_features", "base", "length", "expected"),
    [
        (2.0, 0, 64, 6e5, 32768, 1.328e6),
        (4.0, 0, 64, 6e5, 32768, 3.818e6),
        (2.0, 32768, 64, 6e5, 32768, 1.022e6),
        (4.0, 32768, 64, 6e5, 32768, 2.681e6),
        (2.0, 0, 128, 5e5, 4096, 3.4 * 5e5),  # LongLLaDA's factors of LLaDA
        (8.0, 0, 128, 5e5, 4096, 54.4 * 5e5),
        (32.0, 4096, 128, 5e5, 4096, 562 * 5e5),  # UltraLLaDA's
        (2.0, 32, 64, 6e5, 32768, 1.327e6),
    ],
)
def test_ntk_bases_are_the_published_ones(
    factor: float, ahead: int, num_features: int, base: float, length: int, expected: float
) -> None:
    scaling = RotaryScalingConfig("ntk", factor, length, distance_ahead=ahead)
    assert scaling.ntk_base(base, num_features) == pytest.approx(expected, rel=2e-3)
    assert torch.equal(
        rotary_frequencies(num_features, base, scaling),
        rotary_frequencies(num_features, scaling.ntk_base(base, num_features)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_1_is_the_identity_bit_for_bit(one_rank: None, kind: str) -> None:
    scaling = RotaryScalingConfig(kind, 1.0, 4096)
    for model in (LING, QWEN3):
        assert torch.equal(rotary_frequencies(scaling=scaling, **model), rotary_frequencies(**model))
    assert scaling.temperature == 1.0
    states, positions = torch.randn(9, 1, 4, 16), torch.arange(9).unsqueeze(0) * 500
    assert torch.equal(_turned(states, positions, scaling), _turned(states, positions, None))


def _turned(states: Tensor, positions: Tensor, scaling: RotaryScalingConfig | None) -> Tensor:
    """States [s, b, n, d] turned as a layer turns them, half of each head passing."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config as temperature_of,
    )

    from megatron_dllm.model.megatron_config import transformer_config
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.device import DeviceFacts

    model = tiny_model(rotary_percent=0.5, rotary_base=10000.0, rotary_scaling=scaling, max_position_embeddings=65536)
    config = transformer_config(model, ParallelConfig(), choose_paths(model, ParallelConfig(), DeviceFacts.here()))
    angles = rotary_angles(positions, model.kv_channels, 0.5, 10000.0, scaling)
    return apply_rotary_pos_emb(states, angles, config, mscale=temperature_of(config))


@pytest.mark.parametrize("name", STRETCHED)
def test_a_product_depends_on_the_distance_alone_and_the_temperature_on_what_turns(one_rank: None, name: str) -> None:
    scaling, generator = STRETCHED[name], torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 16, generator=generator)
    places = torch.tensor([[0, 7, 100, 107, 1000, 1007]])
    turned = _turned(torch.stack([query, key] * 3)[:, None, None], places, scaling)[:, 0, 0]
    products = (turned[0::2] * turned[1::2]).sum(-1)
    torch.testing.assert_close(products, products[:1].expand(3), rtol=1e-4, atol=1e-4)
    assert torch.equal(turned[0, 8:], query[8:]), "features that do not turn have no temperature"
    torch.testing.assert_close(turned[0, :8], query[:8] * scaling.temperature)


def test_a_slow_pair_stands_where_a_nearer_token_stood() -> None:
    """Interpolation: position p of the longer context has the angle of position p / factor."""
    near, far = torch.tensor([[8000]]), torch.tensor([[32000]])
    stretched = rotary_angles(far, 128, 0.5, 6e5, STRETCHED["yarn"])[..., 21:32]
    torch.testing.assert_close(stretched, rotary_angles(near, 128, 0.5, 6e5)[..., 21:32], rtol=1e-6, atol=0)

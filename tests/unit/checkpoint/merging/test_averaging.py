"""Weights worked out by hand, and the mean against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_dllm.checkpoint.merging.averaging import merge_weights, round_once, weighted_mean


def test_weights_by_hand() -> None:
    assert merge_weights("uniform", 4) == [0.25] * 4
    assert merge_weights("linear", 4) == pytest.approx([0.25] * 4)
    # 1 - sqrt(x) at 0, 1/4, 1/2, 3/4, 1 falls by these steps.
    assert merge_weights("1-sqrt", 4) == pytest.approx(
        [0.5, math.sqrt(0.5) - 0.5, math.sqrt(0.75) - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    )
    # (1 + cos(pi x)) / 2 at 0, 1/3, 2/3, 1 is 1, 3/4, 1/4, 0.
    assert merge_weights("cosine", 3) == pytest.approx([0.25, 0.5, 0.25])
    with pytest.raises(ValueError, match="weights"):
        merge_weights("square", 3)


@pytest.mark.parametrize("kind", ["linear", "1-sqrt", "cosine"])
def test_weights_scale_updates_by_the_decay(kind: str) -> None:
    weights = merge_weights(kind, 5)
    assert sum(weights) == pytest.approx(1.0)
    decay = {
        "linear": lambda x: 1 - x,
        "1-sqrt": lambda x: 1 - math.sqrt(x),
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    }
    for update in range(1, 5):
        assert sum(weights[update:]) == pytest.approx(decay[kind](update / 5))


def _nearest_bf16(value: Fraction) -> float:
    """Round to nearest, ties to even, by exact arithmetic."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value)))
    exponent -= Fraction(2) ** exponent > abs(value)
    exponent += Fraction(2) ** (exponent + 1) <= abs(value)
    step = Fraction(2) ** (max(exponent, -126) - 7)
    return float(round(value / step) * step)


def test_mean_of_bf16_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(10.0).pow(torch.randint(-4, 3, (5, 3000), generator=generator))
    inputs = list((torch.randn(5, 3000, generator=generator) * scale).bfloat16())
    out = torch.empty(3000, dtype=torch.bfloat16)
    weighted_mean(inputs, [0.2] * 5, out)
    expected = [_nearest_bf16(sum(Fraction(float(tensor[place])) for tensor in inputs) / 5) for place in range(3000)]
    assert out.tolist() == expected


def test_subnormal_bf16_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3000, generator=generator, dtype=torch.float64) * 2.0 ** torch.randint(
        -137, -122, (3000,), generator=generator
    )
    middle = 3.5 * 2.0**-133  # of two subnormal numbers
    values = torch.cat([values, torch.tensor([0.0, middle, middle * (1 + 2.0**-40), -middle * (1 - 2.0**-40)])])
    out = torch.empty(len(values), dtype=torch.bfloat16)
    round_once(values.clone(), out)
    assert out.tolist() == [_nearest_bf16(Fraction(float(value))) for value in values]


def test_two_roundings_would_differ() -> None:
    # Just above and just below the middle between 1 and 1 + 2^-7: fp32 cannot tell them from the middle.
    middle = 1 + 2.0**-8
    values = torch.tensor(
        [middle + 2.0**-40, middle - 2.0**-40, middle, middle + 2.0**-7, -middle - 2.0**-40], dtype=torch.float64
    )
    out = torch.empty(5, dtype=torch.bfloat16)
    round_once(values.clone(), out)
    assert out.tolist() == [1 + 2.0**-7, 1.0, 1.0, 1 + 2.0**-6, -1 - 2.0**-7]
    assert values.bfloat16().tolist() != out.tolist()


def test_fp16_is_rounded_once_too() -> None:
    """Over its normal numbers, its subnormal ones and beyond both ends."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3000, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(
        -9, 6, (3000,), generator=generator
    )
    middles = torch.tensor([1 + 2.0**-11, 2.0**-15 + 2.0**-25, 2.0**-25, 65520.0], dtype=torch.float64)
    values = torch.cat([values, middles, middles * (1 + 2.0**-45), -middles * (1 - 2.0**-45)])
    out = torch.empty(len(values), dtype=torch.float16)
    round_once(values.clone(), out)
    with np.errstate(over="ignore"):
        expected = values.numpy().astype(np.float16)  # in one step
    assert torch.equal(out, torch.from_numpy(expected))
    assert not torch.equal(out, values.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_of_wide_dtypes_equals_fp64_rounded_once(dtype: torch.dtype) -> None:
    inputs = list(torch.randn(3, 200_000, dtype=dtype))
    out = torch.empty(200_000, dtype=dtype)
    weighted_mean(inputs, [1 / 3] * 3, out)
    assert torch.equal(out, torch.stack(inputs).double().mean(0).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["uniform", "1-sqrt", "cosine"])
@pytest.mark.parametrize("number", [2, 3, 5, 7])
def test_mean_of_equal_tensors_is_the_tensor(number: int, kind: str, dtype: torch.dtype) -> None:
    value = (torch.randn(1000) * torch.tensor(10.0).pow(torch.randint(-30, 30, (1000,)))).to(dtype)
    out = torch.empty_like(value)
    weighted_mean([value] * number, merge_weights(kind, number), out)
    assert torch.equal(out, value)

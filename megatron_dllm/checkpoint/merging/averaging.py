"""The weighted mean of several tensors, and the weights that imitate a learning-rate decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Elements averaged at a time: the fp64 sums stay in a core's cache.
_TILE = 1 << 17
# Of the bits of an fp64 number: those that fp32 has no room for, all but the sign, and fp32's smallest normal number.
_CUT_OFF = (1 << 29) - 1
_MAGNITUDE = (1 << 63) - 1
_SMALLEST = (1023 - 126) << 52
# Learning rate left after a fraction x of the decay.
_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}
WEIGHTS = ("uniform", *_DECAYS)


def merge_weights(kind: str, number: int) -> list[float]:
    """Weights of `number` checkpoints, oldest first; they sum to 1.

    A mean over checkpoints theta_0 ... theta_(n-1) equals theta_0 plus the updates between them, each scaled
    by the sum of the weights of the later checkpoints. So a decay f from f(0) = 1 to f(1) = 0 of the update
    sizes is imitated by the weights f(j / n) - f((j + 1) / n) (WSM: decay-free schedule by merging). A linear
    decay gives the uniform mean.

    Args:
        kind: one of WEIGHTS.
        number: of checkpoints.
    """
    if kind not in WEIGHTS:
        raise ValueError(f"weights ({kind}) is not known; use one of {', '.join(WEIGHTS)}.")
    if kind == "uniform":
        return [1.0 / number] * number
    decay = _DECAYS[kind]
    return [decay(j / number) - decay((j + 1) / number) for j in range(number)]


def weighted_mean(inputs: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """Mean in fp64, rounded once.

    Args:
        inputs: k tensors [n] of one floating dtype: bf16, fp16, fp32 or fp64.
        weights: [k], summing to 1; equal ones are applied as one division, so that the mean of equal tensors
            is that tensor, bit for bit.
        out: [n] of the same dtype.
    """
    is_uniform = len(set(weights)) == 1
    total = torch.empty(min(_TILE, out.numel()), dtype=torch.float64)
    scratch = torch.empty(len(total), dtype=torch.int64)
    for begin in range(0, out.numel(), _TILE):
        end = min(begin + _TILE, out.numel())
        tile = total[: end - begin]
        if is_uniform:
            tile.copy_(inputs[0][begin:end])
            for tensor in inputs[1:]:
                tile.add_(tensor[begin:end])
            tile.div_(len(inputs))
        else:
            tile.zero_()
            for tensor, weight in zip(inputs, weights, strict=True):
                tile.add_(tensor[begin:end], alpha=weight)
        round_once(tile, out[begin:end], scratch[: end - begin])


def round_once(values: Tensor, out: Tensor, scratch: Tensor | None = None) -> None:
    """Round fp64 to the dtype of `out`, to nearest, ties to even.

    torch goes from fp64 to bf16 and fp16 by way of fp32, and two roundings to nearest can end one step off. Here the
    first one is to odd (whatever is cut off leaves a 1 in the last bit that stays), after which the second is right.

    Args:
        values: [n] fp64; overwritten.
        out: [n] bf16, fp16, fp32 or fp64.
        scratch: [n] int64 to compute in.
    """
    if out.dtype in (torch.bfloat16, torch.float16):
        bits = values.view(torch.int64)
        scratch = torch.empty_like(bits) if scratch is None else scratch
        torch.bitwise_and(bits, _CUT_OFF, out=scratch)
        bits |= scratch.add_(_CUT_OFF).bitwise_and_(_CUT_OFF + 1)
        bits &= ~_CUT_OFF
        # Numbers below fp32's normal ones, but not 0: less one (as unsigned), they are below the smallest normal one.
        torch.bitwise_and(bits, _MAGNITUDE, out=scratch)
        if len(bits) and int(scratch.sub_(1).bitwise_and_(_MAGNITUDE).amin()) < _SMALLEST - 1:
            # fp32 has fewer bits there than were kept: round in the steps of `out`.
            is_tiny = values.abs() < torch.finfo(torch.float32).tiny
            step = torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
            values[is_tiny] = (values[is_tiny] / step).round() * step
    out.copy_(values)

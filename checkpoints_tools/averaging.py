"""The weighted mean of several tensors, and the weights that imitate a learning-rate decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Elements averaged at a time: the fp64 sums stay in a core's cache.
_TILE = 1 << 17
# dtype -> lowest bits of the fp32 numbers that a second rounding may send the wrong way: (which, their value).
_MOVED = {torch.bfloat16: (0xFFFF, 0x8000), torch.float16: (0x1, 0x0)}
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
    for begin in range(0, out.numel(), _TILE):
        end = min(begin + _TILE, out.numel())
        tile = total[:end - begin]
        if is_uniform:
            tile.copy_(inputs[0][begin:end])
            for tensor in inputs[1:]:
                tile.add_(tensor[begin:end])
            tile.div_(len(inputs))
        else:
            tile.zero_()
            for tensor, weight in zip(inputs, weights, strict=True):
                tile.add_(tensor[begin:end], alpha=weight)
        round_once(tile, out[begin:end])


def round_once(values: Tensor, out: Tensor) -> None:
    """Round fp64 to the dtype of `out`, to nearest, ties to even.

    torch goes from fp64 to bf16 and fp16 by way of fp32, and two roundings in a row can end one step off: where the
    first one lands exactly halfway between two numbers of `out`, it is moved back to the side it came from. In fp16
    the place of the bit that tells halfway depends on the number, so there every fp32 whose last bit is 0 is moved.

    Args:
        values: [n] fp64.
        out: [n] bf16, fp16, fp32 or fp64.
    """
    if out.dtype == torch.float64:
        out.copy_(values)
        return
    single = values.to(torch.float32)
    if out.dtype in _MOVED:
        low_bits, pattern = _MOVED[out.dtype]
        bits = single.view(torch.int32)
        is_moved = (bits & low_bits) == pattern
        if is_moved.any():
            # In sign and magnitude, one bit more or less is one step away from or towards zero.
            lost = torch.nan_to_num(values.abs() - single.double().abs())
            bits += (torch.sign(lost) * is_moved).to(torch.int32)
    out.copy_(single)

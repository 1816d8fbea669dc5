"""Bands of noise levels, and how much the loss of a block varies in each (BD3-LM, arXiv 2503.09573).

A stage with a narrow band [t_min, t_max] has gradients of less variance. What can be measured without a gradient is the
loss of a block, which weighs its share in the gradient: its variance over blocks and draws, relative to its mean.
Levels are drawn over all of (0, 1] once. A band has the blocks whose level lies in it, and given that they are even
on the band. So all bands are compared on the same draws, and the search costs as much as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

T_LEAST = 0.001
WHOLE = (T_LEAST, 1.0)
_WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
_STEPS = 20  # lower ends lie 0.05 apart


@dataclass(frozen=True)
class Band:
    """What the loss of blocks whose level lies in [t_min, t_max] comes to.

    Attributes:
        t_min: lower end.
        t_max: upper end.
        num_blocks: whose level lies in the band; the fewer, the less is known.
        mean: of a block's weighted loss, in nats.
        relative_variance: of it, over the square of its mean.
    """

    t_min: float
    t_max: float
    num_blocks: int
    mean: float
    relative_variance: float


def candidates() -> list[tuple[float, float]]:
    """The bands that are compared: all levels, and those of five widths with lower ends 0.05 apart."""
    found = [WHOLE]
    for width in _WIDTHS:
        lows = [step / _STEPS for step in range(_STEPS) if step / _STEPS + width <= 1.0 + 1e-9]
        found += [(max(low, T_LEAST), round(low + width, 2)) for low in lows]
    return found


def measure_bands(levels: FloatArray, losses: FloatArray, bands: Sequence[tuple[float, float]]) -> list[Band]:
    """Every band, by what varies least.

    Args:
        levels: [n] noise level of each block.
        losses: [n] weighted loss of each block, in nats.
        bands: that are compared.

    Raises:
        ValueError: a band holds fewer than two blocks.
    """
    found = []
    for low, high in bands:
        inside = losses[(levels >= low) & (levels <= high)]
        if len(inside) < 2:
            raise ValueError(
                f"evaluation.num_tokens gives {len(levels)} blocks, of which {len(inside)} lie in [{low:g}, {high:g}]; "
                "two are the least that vary: give more tokens or more draws."
            )
        mean = float(inside.mean())
        relative = float(inside.var(ddof=1)) / mean**2 if mean else float("inf")
        found.append(Band(low, high, len(inside), mean, relative))
    return sorted(found, key=lambda band: band.relative_variance)

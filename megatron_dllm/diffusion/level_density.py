"""How noise levels lie between t_min and t_max: evenly, or more of them in the middle.

Levels come from one even draw u through an inverse distribution function, so they stay stratified over blocks, views
and documents. The bell is a logistic distribution cut to [t_min, t_max], whose functions have closed forms:

    F(t) = 1 / (1 + exp(-(t - center) / width)),    density F (1 - F) / width

A level's loss is divided by its density q(t) relative to the even one, so its mean is that of even levels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.diffusion.noise_spec import NoiseSpec

FloatArray = NDArray[np.float64]


def drawn_levels(spec: NoiseSpec, u: FloatArray) -> FloatArray:
    """[c] float64 noise levels in [t_min, t_max], of even draws u [c] in [0, 1)."""
    if spec.t_density == "uniform":
        return spec.t_min + (spec.t_max - spec.t_min) * u
    low, high = _ends(spec)
    share = low + (high - low) * u
    t = spec.t_bell_center + spec.t_bell_width * np.log(share / (1.0 - share))
    return np.clip(t, spec.t_min, spec.t_max)


def density_weights(spec: NoiseSpec, levels: FloatArray) -> FloatArray:
    """What the loss of levels weighs, [...] float64 of levels [...]: the even density over theirs."""
    if spec.t_density == "uniform":
        return np.ones_like(levels)
    low, high = _ends(spec)
    share = _distribution(spec, levels)
    density = share * (1.0 - share) / (spec.t_bell_width * (high - low))
    return 1.0 / ((spec.t_max - spec.t_min) * density)


def _ends(spec: NoiseSpec) -> tuple[float, float]:
    """F at both ends of the range."""
    low, high = _distribution(spec, np.array([spec.t_min, spec.t_max])).tolist()
    return low, high


def _distribution(spec: NoiseSpec, t: FloatArray) -> FloatArray:
    """F of levels [...]."""
    return 1.0 / (1.0 + np.exp(-(t - spec.t_bell_center) / spec.t_bell_width))

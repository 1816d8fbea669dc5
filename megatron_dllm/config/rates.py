"""Learning rates by kind of parameter: which factor of an ordered table is a parameter's."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase


def rate_factor(name: str, multipliers: Mapping[str, float]) -> float:
    """What a parameter's learning rate is multiplied by: the factor of the last glob that matches, 1 where none does.

    Args:
        name: of the parameter in a checkpoint, as decoder.layers.3.mlp.router.weight.
        multipliers: factor by glob, in order.
    """
    matching = [factor for glob, factor in multipliers.items() if fnmatchcase(name, glob)]
    return matching[-1] if matching else 1.0

"""Functions of tensors that are one kernel on CUDA, and run as they are written elsewhere.

Written as separate operations, each would read and write its tensors through the device's memory, which is all that
these functions cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def fused(function: Callable[..., Result]) -> Callable[..., Result]:
    """Compile a function of tensors where they lie on CUDA; one compilation serves all their sizes."""

    @functools.wraps(function)
    def run(*tensors: Tensor) -> Result:
        return (_compiled(function) if tensors[0].is_cuda else function)(*tensors)

    return run


@functools.cache
def _compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    return torch.compile(function, dynamic=True, fullgraph=True)

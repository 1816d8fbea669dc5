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
from torch.overrides import handle_torch_function, has_torch_function

Result = TypeVar("Result")


def fused(function: Callable[..., Result]) -> Callable[..., Result]:
    """Compile a function of tensors where they lie on CUDA; one compilation serves all their sizes."""

    @functools.wraps(function)
    def run(*tensors: Tensor) -> Result:
        if has_torch_function(tensors):
            # A mode that speaks for a device that is not here (`planning`) is told that this is one kernel.
            return handle_torch_function(run, tensors, *tensors)
        return (_compiled(function) if tensors[0].is_cuda else function)(*tensors)

    run.is_fused = True  # type: ignore[attr-defined]
    return run


@functools.cache
def _compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    return torch.compile(function, dynamic=True, fullgraph=True)

"""Lets go of what token dispatchers keep from one micro-batch to the next.

A dispatcher keeps the tensors of a forward pass as attributes, for later steps of the same pass, until the next pass
overwrites them. Among them are the router's probabilities, whose graph of gradients reaches back to the layer's input.
Where the layer is recomputed, the input is a leaf of that graph: input and gradient stayed alive for every layer from
its backward pass to its next forward pass, beyond the end of the step.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from megatron_dllm.model.dispatch import CopyOrder


def forget_after_use(model: nn.Module) -> None:
    """Have every mixture of experts forget its tokens at the end of its forward pass; once its dispatchers stand."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            made_with = {name for name, value in vars(module.token_dispatcher).items() if isinstance(value, Tensor)}
            module.register_forward_hook(_Forget(frozenset(made_with)))


class _Forget:
    """A forward hook: drops what the dispatcher holds of tokens."""

    def __init__(self, kept: frozenset[str]) -> None:
        """Args: names of the tensors that the dispatcher was made with."""
        self._kept = kept

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        """Megatron-core's layer, and what went into it and came out of it, which stay."""
        dispatcher = module.token_dispatcher
        for name, value in list(vars(dispatcher).items()):
            if isinstance(value, Tensor | CopyOrder) and name not in self._kept:
                setattr(dispatcher, name, None)

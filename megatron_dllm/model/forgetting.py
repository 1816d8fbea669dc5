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
            module.register_forward_hook(Forget(module.token_dispatcher))


class Forget:
    """A forward hook: drops what a dispatcher holds of tokens, and what the part of it holds that sends them."""

    def __init__(self, dispatcher: Any) -> None:
        """Take megatron-core's dispatcher as it was made; the tensors that it has by now stay."""
        self._holders = [dispatcher, *filter(None, [getattr(dispatcher, "_comm_manager", None)])]
        self._kept = [{name for name, value in vars(holder).items() if _is_held(value)} for holder in self._holders]

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        """Megatron-core's layer, and what went into it and came out of it, which stay."""
        for holder, kept in zip(self._holders, self._kept, strict=True):
            for name, value in list(vars(holder).items()):
                if _is_held(value) and name not in kept:
                    setattr(holder, name, None)


def _is_held(value: Any) -> bool:
    return isinstance(value, Tensor | CopyOrder)

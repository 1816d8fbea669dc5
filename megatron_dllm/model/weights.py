"""Reading a module's weight without calling the module."""

from __future__ import annotations

from torch import Tensor, nn


def weight_of(module: nn.Module) -> Tensor:
    """`module.weight`, complete.

    With overlap_param_gather, megatron-core waits for the parameters that other ranks have updated in a hook
    before the module's forward pass. Whoever takes the weight without that pass must call the hook, or computes
    with the weights of the step before.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    weight = module.weight
    assert isinstance(weight, Tensor), "a module without a weight of its own"
    return weight

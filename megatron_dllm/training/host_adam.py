"""AdamW on lists of fp32 tensors: by torch's fused kernel, wherever they lie, or by DeepSpeed's on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# What is kept of one parameter, all of its shape and in fp32: master_param, exp_avg, exp_avg_sq; and step, one number.
State = dict[str, Tensor]
# Moves states by gradients, with the settings of their parameter group.
Update = Callable[[Sequence[State], Sequence[Tensor], Mapping[str, Any]], None]


def torch_update(states: Sequence[State], gradients: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """One step of torch's fused AdamW.

    Args:
        states: of parameters that lie on one device.
        gradients: [n] fp32 of each, beside its state.
        group: lr, betas, eps and weight_decay.
    """
    beta1, beta2 = group["betas"]
    adamw(
        [state["master_param"] for state in states],
        list(gradients),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        foreach=False,
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )


def deepspeed_update() -> Update:
    """DeepSpeed's CPUAdam, whose kernel is compiled when it is first asked for on a machine (some twenty seconds)."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    adam = DeepSpeedCPUAdam([torch.zeros(1)], adamw_mode=True)
    settings = adam.param_groups[0]

    def update(states: Sequence[State], gradients: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        asked = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        for state, gradient in zip(states, gradients, strict=True):
            weight = state["master_param"]
            weight.grad = gradient
            adam.param_groups = [{**settings, **asked, "params": [weight]}]
            adam.state = {weight: {**state, "step": int(state["step"])}}
            adam.step()
            state["step"] += 1
            weight.grad = None

    return update


def host_update(name: str) -> Update:
    """The update of `optimizer.offload_adam`."""
    return deepspeed_update() if name == "deepspeed" else torch_update

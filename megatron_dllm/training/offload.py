"""Adam whose state of some parameters lies in the host's memory and is updated there, for those who have few GPUs.

A parameter of n elements takes 12 n bytes, its fp32 weight and moments, from the GPU to the host. In a step

    1 its gradient travels to the host, while the host updates the parameter before it
    2 the host updates weight and moments in fp32
    3 the weight travels back, rounded to the model's precision

megatron-core's own HybridDeviceOptimizer knows torch's Adam alone, keeps a gradient of every parameter on the host, and
takes parameters of a GPU only. This class stands where megatron-core expects TransformerEngine's precision-aware Adam:
it reads `decoupled_grad`, and keeps the fp32 weights itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_dllm.config import OptimizerConfig
from megatron_dllm.parallel.optimizer_parts import optimizer_parts
from megatron_dllm.training.host_adam import State, Update, host_update, torch_update


class OffloadedAdam:
    """AdamW for megatron-core's distributed optimizer, in fp32 on this rank's shards of the parameters.

    Attributes:
        param_groups: megatron-core's, with their settings.
        state: by parameter, what is kept of it; made at its first step.
        offloaded: the parameters whose state lies on the host.
    """

    def __init__(self, param_groups: list[dict[str, Any]], fraction: float, on_host: Update) -> None:
        """Take the parameters, the share of their elements to offload, and what updates those."""
        self.param_groups = param_groups
        self.state: dict[Tensor, State] = {}
        self.offloaded = _first_share([p for group in param_groups for p in group["params"]], fraction)
        self._on_host = on_host
        longest = max((p.numel() for p in self.offloaded), default=0)
        is_pinned = any(p.is_cuda for p in self.offloaded)
        self._lanes = [_Lane(longest, is_pinned) for _ in range(2)]

    @property
    def host_bytes(self) -> int:
        """Of states and of what travels, in the host's memory."""
        states = [tensor for p in self.offloaded for tensor in self.state.get(p, {}).values()]
        travelling = [tensor for lane in self._lanes for tensor in (lane.gradient, lane.weight)]
        return sum(tensor.nbytes for tensor in [*states, *travelling])

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient; one without only gets its state."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self.state:
                    self.state[parameter] = _new_state(parameter, parameter in self.offloaded)
            moving = [p for p in group["params"] if p.numel() and getattr(p, "decoupled_grad", None) is not None]
            # First what the GPU does by itself while the host works.
            self._update_in_place([p for p in moving if p not in self.offloaded], group)
            self._update_on_host([p for p in moving if p in self.offloaded], group)

    def _update_in_place(self, parameters: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        if not parameters:
            return
        states = [self.state[p] for p in parameters]
        torch_update(states, [p.decoupled_grad for p in parameters], group)  # type: ignore[attr-defined]
        for parameter, state in zip(parameters, states, strict=True):
            if state["master_param"].dtype != parameter.dtype:
                parameter.copy_(state["master_param"])

    def _update_on_host(self, parameters: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        for i, parameter in enumerate(parameters):
            if i == 0:
                self._lanes[0].fetch(parameter.decoupled_grad)  # type: ignore[attr-defined]
            if i + 1 < len(parameters):
                self._lanes[(i + 1) % 2].fetch(parameters[i + 1].decoupled_grad)  # type: ignore[attr-defined]
            lane, state = self._lanes[i % 2], self.state[parameter]
            self._on_host([state], [lane.arrived()], group)
            lane.send(state["master_param"], parameter)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.decoupled_grad = None

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """What is kept of a parameter under a name, as megatron-core asks for it to save it.

        Args:
            parameter: [n] one of the groups'.
            name: master_param, exp_avg or exp_avg_sq.
        """
        return self.state[parameter][name]

    def set_scaled_state(self, parameter: Tensor, name: str, value: Tensor) -> None:
        """Take what megatron-core has loaded.

        Args:
            parameter: [n] one of the groups'.
            name: master_param, exp_avg or exp_avg_sq.
            value: [n] fp32.
        """
        self.state[parameter][name].copy_(value)


class _Lane:
    """The host's end of the way: where one gradient arrives and one weight leaves.

    Attributes:
        gradient: [longest] fp32 of a parameter on the host.
        weight: [longest] fp32, room for its new weight in the model's precision.
    """

    def __init__(self, longest: int, is_pinned: bool) -> None:
        self.gradient, self.weight = (
            torch.empty(longest, dtype=torch.float32, device="cpu", pin_memory=is_pinned) for _ in range(2)
        )
        self._length = 0
        cuda: Any = torch.cuda
        self._arrival, self._departure = cuda.Event(), cuda.Event()

    def fetch(self, gradient: Tensor) -> None:
        """Let a gradient [n] fp32 set out; it has arrived when `arrived` returns."""
        self._length = gradient.numel()
        self.gradient[: self._length].copy_(gradient, non_blocking=True)
        self._arrival.record()

    def arrived(self) -> Tensor:
        """The gradient [n] on the host."""
        self._arrival.synchronize()
        return self.gradient[: self._length]

    def send(self, weight: Tensor, parameter: Tensor) -> None:
        """Let a new weight set out.

        Args:
            weight: [n] fp32 on the host.
            parameter: [n] of the model, which becomes it.
        """
        self._departure.synchronize()
        leaving = self.weight.view(parameter.dtype)[: weight.numel()]
        leaving.copy_(weight)
        parameter.copy_(leaving, non_blocking=True)
        self._departure.record()


def _first_share(parameters: Sequence[Tensor], fraction: float) -> set[Tensor]:
    """The first parameters, as they come, until they hold that share of all elements."""
    limit = fraction * sum(p.numel() for p in parameters)
    chosen: set[Tensor] = set()
    taken = 0
    for parameter in parameters:
        if taken >= limit:
            break
        chosen.add(parameter)
        taken += parameter.numel()
    return chosen


def _new_state(parameter: Tensor, is_offloaded: bool) -> State:
    """The state of a parameter [n] before its first step; fp32 weights that stay where they are are no copy."""
    device = torch.device("cpu") if is_offloaded else parameter.device
    is_shared = not is_offloaded and parameter.dtype == torch.float32
    weight = parameter.detach() if is_shared else parameter.detach().to(device, torch.float32, copy=True)
    return {
        "master_param": weight,
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
        "step": torch.zeros((), dtype=torch.float32, device=device),
    }


def offload_adam(optimizer: MegatronOptimizer, config: OptimizerConfig) -> None:
    """Put `OffloadedAdam` in the place of the Adam behind each distributed optimizer, before the first step."""
    update = host_update(config.offload_adam)
    for part in optimizer_parts(optimizer):
        part.optimizer = OffloadedAdam(part.optimizer.param_groups, config.offload_fraction, update)

"""The ways to compute attention by roles, by name; each is a module with the two functions of `Backend`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from megatron_dllm.model.attention import chunked, dense, flex, shared_prefix


class Backend(Protocol):
    """Turns roles into a plan, once per micro-batch, and attends by it, once per layer."""

    def build_plan(self, query_roles: Tensor, key_roles: Tensor) -> Any:
        """The plan of the mask.

        Args:
            query_roles: [b, q, 3] int32.
            key_roles: [b, k, 3] int32.
        """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: Any, scale: float) -> Tensor:
        """Softmax attention over the visible keys.

        Args:
            query: [b, n, q, d].
            key: [b, g, k, d], every one of the g groups serving n / g heads.
            value: [b, g, k, d].
            plan: see `build_plan`.
            scale: factor on the logits.

        Returns:
            [b, n, q, d]; exactly 0, with zero gradients, where a query sees no key.
        """


BACKENDS: dict[str, Backend] = {"dense": dense, "chunked": chunked, "shared_prefix": shared_prefix, "flex": flex}


def choose_backend(name: str, device: torch.device | str) -> tuple[str, str]:
    """The attention backend to use and why.

    Args:
        name: a key of `BACKENDS`, or auto.
        device: where the tensors live.

    Raises:
        ValueError: for a backend that is unknown or cannot run there.
    """
    device = torch.device(device)
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention_backend ({name}) is not known; use auto or one of {', '.join(BACKENDS)}.")
    if name == "shared_prefix" and device.type != "cpu":
        raise ValueError(
            f"attention_backend (shared_prefix) calls a kernel of the CPU and the tensors are on "
            f"{device.type}; use auto, flex or chunked."
        )
    if name == "flex" and device.type == "cuda" and not has_triton():
        raise ValueError("attention_backend (flex) needs Triton and a GPU that it supports; use chunked.")
    if name != "auto":
        return name, "asked for by name"
    if device.type == "cuda":
        return ("flex", "fastest on CUDA") if has_triton() else ("chunked", "no Triton here, which flex needs")
    if device.type == "cpu":
        return "shared_prefix", "fastest on CPU"
    return "chunked", f"the only one without a mask of the whole row that runs on {device.type}"

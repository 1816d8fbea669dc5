"""The norm of all gradients, for which the host waits once."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_dllm.parallel.device import local_device
from megatron_dllm.parallel.optimizer_parts import optimizer_parts


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The L2 norm of the gradients that are ready for an update, over all ranks (a collective).

    As megatron-core's own `get_grad_norm`, which without TransformerEngine and Apex asks the device for one number for
    each parameter.
    """
    gradients = [gradient for part in optimizer_parts(optimizer) for gradient in part.get_main_grads_for_grad_norm()]
    square = local_norm(gradients) ** 2
    # Of a chain of optimizers, that of all parts: megatron-core asserts it.
    dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return float(square.item() ** 0.5)


def local_norm(gradients: list[Tensor]) -> Tensor:
    """[1] fp32 the norm of this rank's gradients, each of any shape, on the device."""
    if not gradients:
        return torch.zeros(1, dtype=torch.float32, device=local_device())
    return torch.nn.utils.get_total_norm(gradients).float().view(1)

"""Requests to stop (SIGTERM, SIGINT, or SIGUSR1 ahead of a time limit), heeded between steps by all ranks alike.

Between steps nothing is exchanged for it: whether a rank was asked travels with the sums of a step.
"""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from megatron_dllm.run.command import STOP_SIGNALS


class StopRequest:
    """Turns stop signals into a request that is looked at between steps."""

    def __init__(self) -> None:
        """Take over the signals."""
        self._is_set = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: object) -> None:
        self._is_set = True

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._is_set

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop (a collective: all ranks stop at the same step)."""
        flag = torch.tensor([int(self._is_set)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

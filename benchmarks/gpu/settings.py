"""What a part of the acceptance run is told: the device, its sizes, its folder and its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Runs a module with its words, what it says going to a file, in an environment, for so many seconds; gives the exit
# code, or raises TimeoutError.
Run = Callable[[Sequence[str], Path, Mapping[str, str], float], int]


@dataclass(frozen=True)
class Settings:
    """One part's orders.

    Attributes:
        device: cuda or cpu.
        is_small: tiny sizes, for the tests on a CPU.
        folder: a scratch folder of this part's own, inside the output.
        seconds: what the part has.
        started: clock at the start of the part.
        run: how the product's commands are run; None: each as a program of its own.
    """

    device: str
    is_small: bool
    folder: Path
    seconds: float
    started: float = field(default_factory=time.monotonic)
    run: Run | None = None

    def is_over(self, share: float = 1.0) -> bool:
        """Whether more than that share of the seconds since the start of the part has passed."""
        return time.monotonic() - self.started > share * self.seconds

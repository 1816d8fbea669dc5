"""What a part of the acceptance run is told: the device, its sizes, its folder and its time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """One part's orders.

    Attributes:
        device: cuda or cpu.
        is_small: tiny sizes, for the tests on a CPU.
        folder: a scratch folder of this part's own, inside the output.
        seconds: what the part has.
        started: clock at the start of the part.
    """

    device: str
    is_small: bool
    folder: Path
    seconds: float
    started: float = field(default_factory=time.monotonic)

    def is_over(self, share: float = 1.0) -> bool:
        """Whether more than that share of the seconds since the start of the part has passed."""
        return time.monotonic() - self.started > share * self.seconds

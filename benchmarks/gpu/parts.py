"""The parts of the acceptance run, most valuable first, and what each may cost.

A part is a module with one function, `rows(settings)`, that yields one row of its table as soon as it is known.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.settings import Settings


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: of the module in this package.
        share: of the time; what earlier parts leave is shared out anew.
        title: of its table.
    """

    name: str
    share: float
    title: str

    def rows(self, settings: Settings) -> Iterator[dict[str, Any]]:
        """The rows of its table."""
        return importlib.import_module(f"benchmarks.gpu.{self.name}").rows(settings)


PARTS = {
    part.name: part
    for part in (
        Part("facts", 0.04, "What is there"),
        Part("correct", 0.26, "Correct"),
        Part("attention", 0.16, "Attention alone"),
        Part("step", 0.20, "A training step of real sizes"),
        Part("dense", 0.10, "Against a dense mask"),
        Part("decoding", 0.10, "Decoding"),
        Part("whole", 0.14, "The whole pipeline"),
    )
}

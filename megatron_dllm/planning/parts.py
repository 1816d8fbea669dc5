"""What a number is made of: seconds by what takes them, or bytes by what holds them."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Parts:
    """Fields that add up."""

    @property
    def parts(self) -> dict[str, float]:
        """By name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

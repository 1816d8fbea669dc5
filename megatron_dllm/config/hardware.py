"""What the GPUs of a cluster and the links between them are rated at, for the planner."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any

from megatron_dllm.config.rules import check


@dataclass
class HardwareConfig:
    """One GPU and its links, as its maker states them; a GB is 10^9 bytes. 0: not known, and nothing can be planned.

    Which share of these rates a run reaches is an assumption of the planner (`AssumptionsConfig`).
    """

    # Memory of a GPU in GB.
    memory_gb: float = 0.0
    # Products in bf16 without sparsity, in TFLOP/s.
    bf16_tflops: float = 0.0
    # Bandwidth of a GPU's own memory, in GB/s.
    memory_gb_per_s: float = 0.0
    # Bandwidth of a GPU to the others of its node in one direction, in GB/s.
    node_gb_per_s: float = 0.0
    # Bandwidth of a GPU's share of the network in one direction, in GB/s.
    network_gb_per_s: float = 0.0
    # Price of a GPU for an hour in USD; 0: not known, and no cost is shown.
    price_per_hour: float = 0.0
    # The host starts operations while earlier ones still run, as with a GPU. false for a CPU, which does both itself.
    is_asynchronous: bool = True

    def validate(self) -> None:
        """Raise ValueError for a negative rating."""
        for field in _ratings():
            value = getattr(self, field.name)
            check(value >= 0.0, f"cluster.hardware.{field.name} ({value}) must not be negative; 0 means not known.")

    def check_known(self) -> None:
        """Refuse hardware of which something is not known that a plan needs.

        Raises:
            ValueError: naming the field.
        """
        for field in _ratings():
            value = getattr(self, field.name)
            check(
                value > 0.0 or field.name == "price_per_hour",
                f"cluster.hardware.{field.name} ({value:g}) must be known to plan; give it, or choose a cluster whose "
                "recipe states it (h100x8, h200x8, b200x8).",
            )


def _ratings() -> list[Field[Any]]:
    """Fields that are numbers."""
    return [field for field in fields(HardwareConfig) if field.name != "is_asynchronous"]

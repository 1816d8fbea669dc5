"""What the planner assumes about a step that no formula gives: shares of rated speeds, fixed times, reserves."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config.rules import check, check_positive

_SHARES = ("product_efficiency", "attention_efficiency", "memory_efficiency", "link_efficiency")


@dataclass
class AssumptionsConfig:
    """Constants of the planner's time and memory; `calibrate=[RUN, ...]` fits the first three to runs of one's own.

    The defaults of the three, and the interval, are those of published runs of other programs
    (benchmarks/results/planner.md); the other constants are assumed. None was measured on this program.
    """

    # Share of a GPU's rated products that matrix products reach.
    product_efficiency: float = 0.83
    # Time in which the host starts the kernels of one layer, forward and backward pass of a micro-batch, in ms: a stage
    # cannot be faster, however small its products.
    host_ms_per_layer: float = 8.6
    # Share of the rated bandwidth of links that collectives reach.
    link_efficiency: float = 0.7
    # How many times as fast as in bf16 the products of the layers are with parallel.precision fp8 (Megatron-Bridge's
    # guide: 1.2 to 1.5).
    fp8_speedup: float = 1.45
    # Share of a GPU's rated products that attention reaches.
    attention_efficiency: float = 0.4
    # Share of the rated bandwidth of a GPU's memory that small operations and the optimizer reach.
    memory_efficiency: float = 0.8
    # Time in which the host updates a parameter that is offloaded (optimizer.offload), with the way of its gradient and
    # its weight, in ns, on a rank's share of the cores.
    offload_ns: float = 0.6
    # Tokens of the busiest expert rank beside the mean.
    expert_imbalance: float = 1.3
    # Memory of a GPU that tensors cannot have (context, NCCL, workspaces, fragments), in GB of 10^9 bytes.
    reserve_gb: float = 4.5
    # Share of a GPU's memory beyond which a plan does not fit.
    memory_limit: float = 0.97
    # Step times are shown as an interval: from so many times the prediction ...
    interval_low: float = 0.65
    # ... to so many times.
    interval_high: float = 1.45
    # Tokens of a document where no corpus is given; null: context_length of the schedule.
    document_length: int | None = None
    # Name of the run that the constants were fitted to; null: none.
    calibrated_on: str | None = None

    def validate(self) -> None:
        """Raise ValueError for constants that no machine has."""
        for name in (*_SHARES, "memory_limit"):
            value = getattr(self, name)
            check(0.0 < value <= 1.0, f"assumptions.{name} ({value}) must lie in (0, 1]; it is a share.")
        for name in ("host_ms_per_layer", "offload_ns", "reserve_gb"):
            value = getattr(self, name)
            check(value >= 0.0, f"assumptions.{name} ({value}) must not be negative; 0 leaves it out.")
        check_positive("assumptions.fp8_speedup", self.fp8_speedup)
        check(
            self.expert_imbalance >= 1.0,
            f"assumptions.expert_imbalance ({self.expert_imbalance}) must be at least 1, which is a perfect balance.",
        )
        check(
            0.0 < self.interval_low <= 1.0 <= self.interval_high,
            f"assumptions.interval_low, interval_high ({self.interval_low}, {self.interval_high}) must lie on both "
            "sides of 1; they multiply the prediction.",
        )
        if self.document_length is not None:
            check_positive("assumptions.document_length", self.document_length)

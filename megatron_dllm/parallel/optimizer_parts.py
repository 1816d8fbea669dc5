"""The optimizers behind megatron-core's chain: one for the dense parameters, one for those of the experts."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import MegatronOptimizer


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers of this rank, chained or alone, without the stubs of those that own no parameter."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]

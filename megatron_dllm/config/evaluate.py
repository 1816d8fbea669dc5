"""What an evaluation loads, measures and writes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config.train import TrainConfig

# Longest segment, unless given, for weights that do not say in which context they were trained.
LONGEST_CONTEXT = 4096


@dataclass
class EvaluateConfig(TrainConfig):
    """A training configuration of which only the measurement counts; what the checkpoint says need not be given."""

    # JSON file with the result, which must not exist yet; null: validation.json beside the weights.
    output: str | None = None
    # Replace an earlier result.
    overwrite: bool = False

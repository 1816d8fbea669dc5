"""Confidence-aware training of a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dllm.config.rules import check

NORMALISE = ("masked",)


@dataclass
class CapConfig:
    """Confidence-aware parallel training (LLaDA2.0 section 5.2): targets that are guessed right become more certain."""

    # What the entropy of a right guess is multiplied by, next to the weighted NLL; 0 turns the method off.
    coefficient: float = 0.0
    # The entropy is that of softmax(logits / temperature).
    temperature: float = 1.0
    # What the sum of entropies is divided by. masked: the maskable tokens, as the NLL is.
    normalise: str = "masked"

    def validate(self, prefix: str, objective: str) -> None:
        """Raise ValueError for an impossible value.

        Args:
            prefix: name of these settings in messages.
            objective: of the stage.
        """
        check(
            math.isfinite(self.coefficient) and self.coefficient >= 0.0,
            f"{prefix}.coefficient ({self.coefficient}) must not be negative; 0 turns confidence-aware training off.",
        )
        check(
            math.isfinite(self.temperature) and self.temperature > 0.0,
            f"{prefix}.temperature ({self.temperature}) must be positive; 1 is the model's own distribution.",
        )
        check(
            self.normalise in NORMALISE,
            f"{prefix}.normalise ({self.normalise}) must be masked; for the weight of a mean over the right guesses, "
            "divide the coefficient by the masked accuracy.",
        )
        check(
            self.coefficient == 0.0 or objective == "block_diffusion",
            f"{prefix}.coefficient ({self.coefficient:g}) needs the block_diffusion objective; an AR stage decodes one "
            "token at a time, set it to 0.",
        )

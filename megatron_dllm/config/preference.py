"""Preference optimisation: of a stage, and what a run compares its model with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dllm.config.rules import check, check_positive

# The value of preference.reference that names no file.
FROZEN = "frozen"


@dataclass
class ReferenceConfig:
    """What preference stages compare the model with: the weights that the run starts from (checkpoint.load)."""

    # A file of their scores, which `evaluate ... scores=FILE` writes once; or frozen: a copy of the weights in memory,
    # on the same layout, which costs a forward pass more in every step.
    reference: str | None = None

    @property
    def scores_file(self) -> str | None:
        """The file of scores; None where the reference lies in memory, or there is none."""
        return None if self.reference == FROZEN else self.reference


@dataclass
class PreferenceConfig:
    """Direct preference optimisation of a stage (LLaDA2.0 section 5.3), on pairs of a chosen and a rejected answer.

    The number of views is the stage's `num_views`, and `view_relation` says how they hang together: complementary views
    are the coupled ones. The report's recipe has one view.
    """

    # How far the model may go from the reference: rewards are beta times the difference of their ELBOs, in nats.
    beta: float = 0.1
    # Weight of the chosen answers' NLL for each token, beside the preference loss; 0: none, as in the report.
    sft_coefficient: float = 0.0
    # Both answers of a pair draw their noise levels alike.
    share_levels: bool = False
    # Draw the number of masked tokens of a block, not t: no weight above block_size, and less variance.
    is_count: bool = True
    # Model and reference are scored on the same masks. false: each on half of the views, to see what sharing is worth.
    share_noise: bool = True

    def validate(self, prefix: str, objective: str, num_views: int, view_relation: str) -> None:
        """Raise ValueError for an impossible value.

        Args:
            prefix: name of these settings in messages.
            objective: of the stage.
            num_views: of the stage.
            view_relation: of the stage.
        """
        check(
            objective == "block_diffusion",
            f"{prefix} needs the block_diffusion objective, and the stage's is {objective}; set it to null.",
        )
        check_positive(f"{prefix}.beta", self.beta)
        check(
            math.isfinite(self.sft_coefficient) and self.sft_coefficient >= 0.0,
            f"{prefix}.sft_coefficient ({self.sft_coefficient}) must not be negative; 0 trains the preferences alone.",
        )
        check(
            self.share_noise or (num_views % 2 == 0 and view_relation == "independent"),
            f"{prefix}.share_noise (false) needs an even number of independent views, half of them for the reference, "
            f"and the stage has num_views {num_views}, view_relation {view_relation}; give 2 and independent.",
        )

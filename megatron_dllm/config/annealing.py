"""Annealing of a stage's attention from causal to bidirectional."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from megatron_dllm.config.rules import check, check_choice, check_positive

WINDOW, RANDOM = KINDS = ("window", "random")
# Whose masks need not be intervals of keys.
PAIR_BACKENDS = ("dense", "flex")


@dataclass
class AttentionAnnealConfig:
    """A stage of one-block documents begins with the causal mask and opens it step by step (after DiffuLLaMA).

    In step i of the stage, from 0, the share r = min(1, (i + 1) / steps) of the mask is open.
    """

    # Optimizer steps of the stage over which the mask opens.
    steps: int = MISSING
    # What opens. window: a token sees the r n tokens behind it, too, in a document of n tokens. random: it sees a share
    # r of all tokens behind it, drawn anew in each step, as published; needs training.attention_backend dense or flex.
    kind: str = WINDOW

    def open_share(self, step: int) -> float:
        """How much of the mask is open, r, in the step after so many of the stage."""
        return min(1.0, (step + 1) / self.steps)

    def validate(self, prefix: str, objective: str, block_size: int, context_length: int, is_preference: bool) -> None:
        """Raise ValueError for an impossible value, or a stage whose mask cannot open.

        Args:
            prefix: name of these settings in messages.
            objective: of the stage.
            block_size: of the stage.
            context_length: of the schedule.
            is_preference: the stage compares answers.
        """
        check_choice(f"{prefix}.kind", self.kind, KINDS)
        check_positive(f"{prefix}.steps", self.steps)
        check(
            objective == "block_diffusion" and block_size == context_length,
            f"{prefix} needs documents of one block, objective block_diffusion with block_size {context_length} (the "
            f"context_length), not {objective} with {block_size}: smaller blocks have a causal mask already; set it to "
            "null.",
        )
        check(not is_preference, f"{prefix} must be null with preference, whose scores are those of the whole mask.")

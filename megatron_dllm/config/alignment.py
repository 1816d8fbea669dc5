"""Alignment of a stage's noisy tokens with the model's own states of clean ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dllm.config.distill import CLEAN, SOURCES, TEACHER
from megatron_dllm.config.rules import check, check_choice


@dataclass
class AlignmentConfig:
    """Representation alignment (after REPR-ALIGN, arXiv 2605.06885): noisy tokens keep close to clean ones.

    The loss of a pair of tokens is 1 - cosine of their states behind a layer, as a mean over the layers. A clean token
    teaches; no gradient goes into its state.
    """

    # What the sum of these losses over all pairs is multiplied by, before it is divided by the maskable tokens as the
    # NLL is; 0 turns the method off.
    weight: float = 0.0
    # Whose clean tokens teach. clean: the model's own, in the clean copy of the same row; teacher: those of the model
    # of teacher.checkpoint, which reads the true tokens in their order. Its states of a step lie in memory.
    source: str = CLEAN
    # A noisy token that is not masked is paired with the same token where it is clean, in every layer.
    visible: bool = True
    # A masked target is paired with the clean token before the one it predicts, in the upper layers.
    masked: bool = True
    # Share of the layers, from the last one down, in which masked targets are paired; at least one layer.
    masked_layers: float = 0.5

    def validate(self, prefix: str, objective: str, has_clean: bool, loss_per: str, is_preference: bool) -> None:
        """Raise ValueError for an impossible value.

        Args:
            prefix: name of these settings in messages.
            objective: of the stage.
            has_clean: the stage's blocks are shorter than its context.
            loss_per: what the stage's loss is a mean over, token or answer.
            is_preference: the stage compares answers.
        """
        check(
            math.isfinite(self.weight) and self.weight >= 0.0,
            f"{prefix}.weight ({self.weight}) must not be negative; 0 turns the alignment off.",
        )
        check(
            0.0 < self.masked_layers <= 1.0,
            f"{prefix}.masked_layers ({self.masked_layers}) must lie in (0, 1]; to leave masked tokens out, set "
            f"{prefix}.masked to false.",
        )
        check_choice(f"{prefix}.source", self.source, SOURCES)
        if self.weight == 0.0:
            return
        given = f"{prefix}.weight ({self.weight:g})"
        check(
            objective == "block_diffusion",
            f"{given} needs the block_diffusion objective, as an {objective} stage has no noisy tokens; set it to 0.",
        )
        check(
            has_clean or self.source == TEACHER,
            f"{given} with source clean needs clean copies, and blocks of the whole context have none; give a smaller "
            "block_size, or take source teacher.",
        )
        check(
            self.visible or self.masked,
            f"{given} has no tokens to align with {prefix}.visible and {prefix}.masked false; set one of them to true.",
        )
        check(
            loss_per == "token" and not is_preference,
            f"{given} needs a loss of tokens, and the stage's is of answers; set it to 0.",
        )

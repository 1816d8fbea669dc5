"""The rules of clean copies in blocks of their own, and of the AR loss that their tokens may carry."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_dllm.config.rules import check, check_positive, nearest_divisors

if TYPE_CHECKING:
    from megatron_dllm.config.schedule import StageConfig


def check_clean_copies(prefix: str, stage: StageConfig, context_length: int) -> None:
    """Raise ValueError for clean blocks or an AR loss that a stage cannot have.

    Args:
        prefix: name of the stage in messages.
        stage: that has them.
        context_length: of the schedule.
    """
    size = stage.clean_block_size
    if size is not None:
        check_positive(f"{prefix}.clean_block_size", size)
        check(
            stage.objective != "ar" or size == 1,
            f"{prefix}.clean_block_size ({size}) must be null with objective ar, whose tokens see no later ones.",
        )
        check(
            stage.block_size % size == 0,
            f"{prefix}.clean_block_size ({size}) must divide block_size ({stage.block_size}); "
            f"use {nearest_divisors(stage.block_size, size)}.",
        )
    check(
        stage.ar_weight >= 0.0 and math.isfinite(stage.ar_weight),
        f"{prefix}.ar_weight ({stage.ar_weight}) must be a number that is not negative; 0 takes no AR loss.",
    )
    check(0.0 <= stage.ar_share <= 1.0, f"{prefix}.ar_share ({stage.ar_share}) must lie in [0, 1]; 1 takes all tokens.")
    check(
        0.0 <= stage.ar_row_share < 1.0,
        f"{prefix}.ar_row_share ({stage.ar_row_share}) must lie in [0, 1); for AR rows alone, take objective ar.",
    )
    if stage.ar_weight:
        _check_ar_loss(prefix, stage, context_length)
        return
    for name, value, default in (("ar_share", stage.ar_share, 1.0), ("ar_row_share", stage.ar_row_share, 0.0)):
        check(
            value == default,
            f"{prefix}.{name} ({value}) has no effect without ar_weight; leave it out, or give ar_weight.",
        )


def _check_ar_loss(prefix: str, stage: StageConfig, context_length: int) -> None:
    """What the AR loss needs of its stage."""
    key = f"{prefix}.ar_weight ({stage.ar_weight:g})"
    check(stage.objective != "ar", f"{key} must be 0 with objective ar, whose loss is the AR loss already.")
    check(
        stage.clean_target_share > 0.0 or stage.ar_row_share > 0.0,
        f"{key} needs clean tokens that see no later ones: this stage's see blocks of {stage.clean_grid}, and ar_share "
        f"({stage.ar_share:g}) is the share that predicts; set clean_block_size=1, or give ar_row_share.",
    )
    check(
        stage.block_size < context_length or not stage.clean_target_share,
        f"{key} needs clean tokens, and block_size ({stage.block_size}) equal to context_length leaves none; leave out "
        "clean_block_size and give ar_row_share, use a smaller block_size, or ar_weight=0.",
    )
    check(
        stage.clean_grid == 1 or stage.ar_share == 1.0,
        f"{prefix}.ar_share ({stage.ar_share}) has no effect with clean blocks of {stage.clean_grid}; leave it out.",
    )
    check(
        not stage.ar_row_share or stage.num_epochs is None,
        f"{prefix}.num_epochs ({stage.num_epochs}) must be null with ar_row_share ({stage.ar_row_share}), whose rows "
        "have epochs of their own; give num_tokens.",
    )
    check(stage.cap.coefficient == 0.0, f"{key} must be 0 with cap.coefficient; train the one after the other.")
    check(stage.preference is None, f"{key} must be 0 with preference, whose loss is of answers; set it to 0.")
    if stage.sft is not None:
        check(
            stage.sft.loss_per == "token",
            f"{key} is of tokens, and sft.loss_per ({stage.sft.loss_per}) is not token; use loss_per token.",
        )
        check(
            stage.sft.turn_boundary != "last",
            f"{key} is of all answers, and sft.turn_boundary (last) trains the last one alone; use split_views.",
        )

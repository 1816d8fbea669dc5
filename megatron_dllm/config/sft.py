"""Supervised fine-tuning on chats, in a stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config.rules import check, check_choice, check_positive

FILLS = ("eos", "none")
TURN_BOUNDARIES = ("split_views", "mask_later", "last", "all")
LOSS_PER = ("token", "answer")


@dataclass
class SftConfig:
    """How the answers of chats are trained (LLaDA2.0 section 5.1); it needs a corpus with spans."""

    # What stands between the end of an answer and the end of its block. eos: end-of-text tokens, which are trained too,
    # as decoding always fills whole blocks; at most block_size - 1 for each answer. none: nothing.
    fill: str = "eos"
    # Weight of the loss on these tokens, next to 1 for those of an answer.
    fill_weight: float = 1.0
    # What an answer that ends in mid-block sees behind it. split_views: nothing; the next answer's beginning has a
    # noisy block of its own (at most block_size tokens more for each answer and view). mask_later: mask tokens; the
    # next answer's beginning in that block is not trained. last: only a document's last answer carries a loss. all:
    # what follows, which a server never shows.
    turn_boundary: str = "split_views"
    # What the loss is a mean over. answer: every answer counts the same, however long it is.
    loss_per: str = "token"

    def validate(self, prefix: str, objective: str, cap_coefficient: float) -> None:
        """Raise ValueError for an impossible value.

        Args:
            prefix: name of the stage in messages.
            objective: of the stage.
            cap_coefficient: of the stage's confidence-aware training.
        """
        check_choice(f"{prefix}.sft.fill", self.fill, FILLS)
        check_choice(f"{prefix}.sft.turn_boundary", self.turn_boundary, TURN_BOUNDARIES)
        check_choice(f"{prefix}.sft.loss_per", self.loss_per, LOSS_PER)
        check_positive(f"{prefix}.sft.fill_weight", self.fill_weight)
        check(
            objective == "block_diffusion",
            f"{prefix}.sft needs the block_diffusion objective, and the stage's is {objective}; set it to null.",
        )
        check(
            self.loss_per == "token" or cap_coefficient == 0.0,
            f"{prefix}.cap.coefficient ({cap_coefficient:g}) must be 0 with sft.loss_per answer, as entropies are "
            "summed over tokens; use loss_per token.",
        )

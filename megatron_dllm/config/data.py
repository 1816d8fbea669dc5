"""The corpora, how rows are filled, and how tokens are masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from megatron_dllm.config.blend import blend_parts
from megatron_dllm.config.rules import check, check_choice, check_positive

BLOCK_ORIGINS = ("document", "row")
T_UNITS = ("block", "document", "row")
EXHAUSTED_ACTIONS = ("repeat", "refuse")


@dataclass
class DataConfig:
    """Tokenized corpora (.bin/.idx prefixes, without suffix) and how rows are filled."""

    # Corpora to train on: one prefix, or weights and prefixes in turn: [0.7, data/web, 0.3, data/code]. A weight is a
    # share of the document tokens.
    train: Any = MISSING
    # When a corpus has been read through: repeat begins its next epoch in another order; refuse does not start a
    # schedule that would need one.
    on_exhausted: str = "repeat"
    # Let a resume train on other corpora or shares than the checkpoint names; say it at that start alone.
    change_blend: bool = False
    # Prefix of the held-out corpus; null: none.
    validation: str | None = None
    # Folder of the tokenizer that made the corpora: compared with them and kept beside the run; null: neither.
    tokenizer: str | None = None
    # Documents that are packed together into rows; with more of them, rows are filled better.
    packing_chunk: int = 1024
    # Where blocks begin to count: document (anew in each segment) or row.
    block_origin: str = "document"
    # Store a noisy copy of a block only if a token of it may carry a loss, and a clean copy only if a later such block
    # of its document reads it (exact).
    prune_clean: bool = True
    # Processes of each rank that build rows; 0: the training process does.
    num_workers: int = 0

    def validate(self) -> None:
        """Raise ValueError for values that cannot work with any corpus; files are checked when they are opened."""
        blend_parts("data.train", self.train)
        check_choice("data.on_exhausted", self.on_exhausted, EXHAUSTED_ACTIONS)
        check_choice("data.block_origin", self.block_origin, BLOCK_ORIGINS)
        check_positive("data.packing_chunk", self.packing_chunk)
        check(
            self.num_workers >= 0,
            f"data.num_workers ({self.num_workers}) must not be negative; 0 builds rows in the training process.",
        )


@dataclass
class NoiseConfig:
    """How noise levels are drawn in all stages. `t` is the probability that a token is masked (linear schedule)."""

    # What shares one noise level: block, document or row.
    t_unit: str = "block"
    # Spread t evenly over the blocks of a document and, with a low-discrepancy sequence, over documents.
    is_stratified: bool = True

    def validate(self) -> None:
        """Raise ValueError for an unknown choice."""
        check_choice("noise.t_unit", self.t_unit, T_UNITS)

"""What an evaluation loads, measures and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dllm.config.rules import check
from megatron_dllm.config.train import TrainConfig

# Longest segment, unless given, for weights that do not say in which context they were trained.
LONGEST_CONTEXT = 4096
# What a measuring command calls its most common keys.
SHORT_NAMES = {"checkpoint": "checkpoint.load", "block_sizes": "evaluation.block_sizes"}


def spelled_out(words: Sequence[str]) -> list[str]:
    """`key=value` words with the full names of their keys."""
    pairs = [word.partition("=") for word in words]
    return ["".join((SHORT_NAMES.get(key, key) if equals else key, equals, value)) for key, equals, value in pairs]


def check_one_size(words: Sequence[str]) -> None:
    """Refuse several block sizes for a command that measures at one.

    Args:
        words: from `spelled_out`.
    """
    sizes = [value for key, _, value in (word.partition("=") for word in words) if key == "evaluation.block_sizes"]
    check(not sizes, f"block_sizes ({', '.join(sizes)}) are for evaluate; this command has one: block_size=N.")


@dataclass
class EvaluateConfig(TrainConfig):
    """A training configuration of which only the measurement counts; what the checkpoint says need not be given."""

    # JSON file with the result, which must not exist yet; null: validation.json beside the weights.
    output: str | None = None
    # Score the pairs of data.train with checkpoint.load instead, for an experiment of preferences, and write the scores
    # into this file; PREFIX.scores names the corpus too. Null: measure the ELBO.
    scores: str | None = None
    # Replace an earlier result.
    overwrite: bool = False

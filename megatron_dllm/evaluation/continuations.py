"""Continuations to be scored, as documents: the context is fixed, the continuation carries a loss.

The block grid begins at position 0 of the context, whose tail shares the first block of the continuation and stays
visible there. What stands behind the continuation in its last block is a choice (`config.likelihood`), since it changes
the score. Blocks of 4, a context c of 6 tokens, a continuation y of 3:

    fill mask   c c c c | c c y y | y _ _ _      mask tokens without a loss
    fill none   c c c c | c c y y | y
    fill eos    c c c c | c c y y | y E E E      end-of-text tokens, scored too

The first three positions of y are what one view may mask; clean copies stand before them as in training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_dllm.data.memory_source import MemorySource
from megatron_dllm.data.spans import MASKABLE, MASKED, Spans

# Continuations with one noise key are told apart by so many bits of their sample ids.
NUM_SIBLING_BITS = 20
# Keys that leave room for these in an int64.
LARGEST_KEY = 2 ** (63 - NUM_SIBLING_BITS) - 1


@dataclass(frozen=True)
class Continuation:
    """What is to be scored.

    Attributes:
        context: tokens before it; empty where there are none.
        tokens: of the continuation.
        noise_key: continuations with the same one have the same noise, as the choices of a question should.
        name: what messages call it; two that differ in nothing else are equal.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    noise_key: int = 0
    name: str = field(default="request", compare=False)

    def num_scored(self, block_size: int, fill: str, context_length: int) -> list[int]:
        """Scored tokens of each block that has any.

        Args:
            block_size: of the grid.
            fill: see `config.likelihood`.
            context_length: where the last block ends at the latest.
        """
        start, stop = len(self.context), len(self.context) + len(self.tokens)
        if fill == "eos":
            stop += _num_fill(stop, block_size, context_length)
        blocks = range(start // block_size, (stop - 1) // block_size + 1)
        return [min(stop, (block + 1) * block_size) - max(start, block * block_size) for block in blocks]

    def fitted(self, context_length: int, may_cut: bool) -> Continuation:
        """The same, or without the beginning of its context, so that it fits the window.

        Raises:
            ValueError: there is nothing to score, or it does not fit.
        """
        if not self.tokens:
            raise ValueError(
                f"{self.name}: the continuation is empty and has no likelihood to compare; give it at least one token."
            )
        too_many = len(self.context) + len(self.tokens) - context_length
        if too_many <= 0:
            return self
        if not may_cut or too_many >= len(self.context):
            raise ValueError(
                f"{self.name}: context and continuation ({len(self.context)} + {len(self.tokens)} tokens) must fit "
                f"context_length ({context_length}); give fewer examples (num_fewshot), a longer "
                "schedule.context_length, or likelihood.truncate=true, which cuts the beginning of contexts."
            )
        return Continuation(self.context[too_many:], self.tokens, self.noise_key, self.name)


def source_of(
    continuations: Sequence[Continuation], block_size: int, fill: str, context_length: int, eos_token_id: int
) -> MemorySource:
    """The documents of continuations that fit the window, in order.

    Args:
        continuations: all of them different, or they share a score.
        block_size: of the grid.
        fill: see `config.likelihood`.
        context_length: where the last block ends at the latest.
        eos_token_id: fills blocks with `fill` eos; without meaning for the masked ones, which show the mask token.
    """
    documents, spans = [], []
    for item in continuations:
        start, stop = len(item.context), len(item.context) + len(item.tokens)
        num_fill = 0 if fill == "none" else _num_fill(stop, block_size, context_length)
        documents.append((*item.context, *item.tokens, *[eos_token_id] * num_fill))
        parts = [(start, stop, MASKABLE)]
        if num_fill:
            parts.append((stop, stop + num_fill, MASKABLE if fill == "eos" else MASKED))
        spans.append(parts)
    return MemorySource(documents, _sample_ids(continuations), Spans.of_lists(spans))


def _num_fill(stop: int, block_size: int, context_length: int) -> int:
    return min(-stop % block_size, context_length - stop)


def _sample_ids(continuations: Sequence[Continuation]) -> list[int]:
    """The noise key of each, and in the lowest bits which of those with that key it is."""
    seen: Counter[int] = Counter()
    ids = []
    for item in continuations:
        assert 0 <= item.noise_key <= LARGEST_KEY, f"noise key {item.noise_key} leaves no room for siblings"
        assert seen[item.noise_key] < 2**NUM_SIBLING_BITS, f"too many continuations with noise key {item.noise_key}"
        ids.append((item.noise_key << NUM_SIBLING_BITS) + seen[item.noise_key])
        seen[item.noise_key] += 1
    return ids

"""How prompts enter a batch: their whole blocks as clean tokens, in few passes, and what several share only once.

Keys and values of whole blocks depend on the tokens up to their end alone, so a prompt takes over those of another
text that begins alike (few-shot examples, a system prompt) and computes the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Tokens of one pass, padding included: enough to keep a device busy, few enough for the memory of any.
MAX_TOKENS = 8192


@dataclass(frozen=True)
class Entrant:
    """A prompt that enters.

    Attributes:
        slot: where it goes.
        ids: of its whole blocks.
        source: slot whose first `num_shared` tokens are the same and are taken over; None: none is.
    """

    slot: int
    ids: Sequence[int]
    source: int | None = None
    num_shared: int = 0

    @property
    def num_computed(self) -> int:
        """Tokens that it has to compute."""
        return len(self.ids) - self.num_shared


def plan_prefill(
    present: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], block_size: int, max_tokens: int = MAX_TOKENS
) -> Iterator[list[Entrant]]:
    """Groups of prompts that one pass computes; a group's sources lie in earlier groups or are present.

    A prompt takes over what it shares if that is at least half of it: less is not worth waiting for.

    Args:
        present: kept tokens of the texts in slots 0, 1, ...
        prompts: whole blocks of those that enter, for the slots that follow; some may be empty.
        block_size: of the grid.
        max_tokens: of a pass, padding included; one longer prompt may exceed it.
    """
    slots: list[Sequence[int]] = list(present)
    group: list[Entrant] = []
    for ids in prompts:
        entrant = _share(len(slots), ids, slots, block_size)
        slots.append(ids)
        waits = entrant.source is not None and bool(group) and entrant.source >= group[0].slot
        longest = max((other.num_computed for other in [*group, entrant]), default=0)
        if group and (waits or longest * (len(group) + 1) > max_tokens):
            yield group
            group = []
        group.append(entrant)
    if group:
        yield group


def _share(slot: int, ids: Sequence[int], slots: Sequence[Sequence[int]], block_size: int) -> Entrant:
    """The prompt with the slot that has most of it, if any has half."""
    shared = [_num_alike(ids, other, block_size) for other in slots]
    most = max(shared, default=0)
    if not most or 2 * most < len(ids):
        return Entrant(slot, ids)
    return Entrant(slot, ids, shared.index(most), most)


def _num_alike(ids: Sequence[int], other: Sequence[int], block_size: int) -> int:
    """Tokens in whole blocks that two texts have in common at their beginning."""
    num_blocks = min(len(ids), len(other)) // block_size
    low = 0
    while (
        low < num_blocks
        and ids[low * block_size : (low + 1) * block_size] == (other[low * block_size : (low + 1) * block_size])
    ):
        low += 1
    return low * block_size

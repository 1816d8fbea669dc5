"""How much room decoding makes for texts: rules without torch, for what decodes and for what plans it."""

from __future__ import annotations

# Elements of the logits that exist at a time (tokens x vocabulary), unless one row has more.
LOGITS_ELEMENTS = 64 * 1024 * 1024
# The memory of keys and values grows by so many tokens of every slot at the least.
_GROWTH = 256


def room_for(num_keys: int, capacity: int) -> int:
    """Tokens of a slot that there is room for, after a pass that sees so many of them.

    Args:
        num_keys: tokens that the pass sees, its own included.
        capacity: tokens that there was room for.
    """
    return capacity if num_keys <= capacity else max(num_keys, capacity + _GROWTH, capacity * 3 // 2)

"""Where the clean copy of a token stands: slots of a row found by (row, document, position)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, PADDING_DOC, VIEW


def slot_keys(roles: Tensor, position_ids: Tensor, row_length: int) -> Tensor:
    """[b, s] int64 a number of each token's row, document and position, the same in all its copies.

    The number before it belongs to the position before it, or to nothing.

    Args:
        roles: [b, s, 3] int32 token roles.
        position_ids: [b, s] int64 positions in the documents.
        row_length: of whole rows; no document or position of one has a number as large.
    """
    rows = torch.arange(len(roles), device=roles.device).unsqueeze(-1)
    size = row_length + 2
    return (rows * size + roles[..., DOC].long() + 1) * size + position_ids + 1


def is_clean(roles: Tensor) -> Tensor:
    """[b, s] bool which tokens of roles [b, s, 3] belong to clean copies."""
    return (roles[..., VIEW] == CLEAN_VIEW) & (roles[..., DOC] != PADDING_DOC)


def is_noisy(roles: Tensor) -> Tensor:
    """[b, s] bool which tokens of roles [b, s, 3] belong to noisy views."""
    return (roles[..., VIEW] != CLEAN_VIEW) & (roles[..., DOC] != PADDING_DOC)


def find_slots(wanted: Tensor, keys: Tensor, is_offered: Tensor) -> tuple[Tensor, Tensor]:
    """Slots by their keys, without waiting for the device.

    Args:
        wanted: [n] int64 keys to find.
        keys: [m] int64 keys of all slots.
        is_offered: [m] bool which slots may be found; their keys differ.

    Returns:
        [n] int64 index of the slot that has each wanted key, and [n] bool whether there is one; any index where not.
    """
    offered = torch.where(is_offered, keys, -1)
    order = torch.argsort(offered)
    ordered = offered[order]
    place = torch.searchsorted(ordered, wanted).clamp(max=len(keys) - 1)
    return order[place], ordered[place] == wanted

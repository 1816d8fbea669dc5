"""The reference backend: the whole mask, given to torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron_dllm.diffusion.roles import visible
from megatron_dllm.model.attention.random_pairs import PLACE, RandomPairs, is_open

IS_COMPILED_PER_SHAPE = False


def build_plan(query_roles: Tensor, key_roles: Tensor, pairs: RandomPairs | None = None) -> Tensor:
    """The mask [b, 1, q, k] bool of roles [b, q, 3] and [b, k, 3].

    Args:
        query_roles: [b, q, 3] int32; with `pairs` [b, q, 5], places and documents' numbers behind the roles.
        key_roles: [b, k, 3] int32, or [b, k, 5].
        pairs: of the visible ones these alone; None: all.
    """
    mask = visible(query_roles, key_roles)
    if pairs is not None:
        of_query, of_key = pairs.of_query(query_roles).unsqueeze(-1), pairs.of_key(key_roles).unsqueeze(-2)
        places = query_roles[..., PLACE].unsqueeze(-1), key_roles[..., PLACE].unsqueeze(-2)
        mask = mask & is_open(*places, of_query, of_key, pairs.limit)
    return mask.unsqueeze(1)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Tensor, scale: float) -> Tensor:
    """Softmax attention over the visible keys.

    Args:
        query: [b, n, q, d].
        key: [b, g, k, d], every one of the g groups serving n / g heads.
        value: [b, g, k, d].
        plan: [b, 1, q, k] bool, see `build_plan`.
        scale: factor on the logits.

    Returns:
        [b, n, q, d]; exactly 0, with zero gradients, where a query sees no key.
    """
    has_key = plan.any(dim=-1, keepdim=True)
    return masked_attention(query, key, value, plan | ~has_key, scale).masked_fill(~has_key, 0.0)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Torch's scaled_dot_product_attention of [b, n, q, d] and [b, g, k, d]; `mask` bool, None: all visible."""
    if query.is_cuda and mask is not None and query.shape[1] != key.shape[1]:
        # Before Hopper no fused kernel takes a mask and groups: torch would write out the logits of all pairs.
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )

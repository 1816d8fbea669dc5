"""What block-diffusion transformers are made of: norms, MLPs, rotary embedding, attention, experts, their cache.

Plain PyTorch. Shapes: b batch, n tokens of this call, c tokens in the cache, h hidden, d head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rotary_scaling import scaled_frequencies, temperature_of


class BlockCache:
    """Keys and values of finished blocks, one pair of [b, groups, c, d] per layer."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.is_committing = False

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put what is stored before this call's keys and values; keep the result while committing.

        Args:
            layer: that they belong to.
            key: [b, groups, n, d] of this call.
            value: [b, groups, n, d] of this call.

        Returns:
            [b, groups, c + n, d] each.
        """
        if layer < len(self.keys):
            key = torch.cat([self.keys[layer], key], dim=2)
            value = torch.cat([self.values[layer], value], dim=2)
        if self.is_committing:
            self.keys[layer:layer + 1] = [key]
            self.values[layer:layer + 1] = [value]
        return key, value

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.keys[0].shape[2] if self.keys else 0


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise `hidden` [..., size]."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` [..., h] to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def rotary_angles(position_ids: Tensor, rotary_dim: int, theta: float, scaling: dict[str, Any],
                  dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, computed in fp32, times the temperature of a scaling.

    Args:
        position_ids: [b, n] places from the start of the text.
        rotary_dim: features of a head that turn.
        theta: base of their wavelengths.
        scaling: of `rotary_scaling.scaling_of`.
        dtype: of the result.

    Returns:
        [b, 1, n, rotary_dim] each.
    """
    # Not a buffer: its values would be lost where a model is created without memory.
    exponent = torch.arange(0, rotary_dim, 2, device=position_ids.device).float() / rotary_dim
    angles = position_ids.unsqueeze(-1).float() * scaled_frequencies(theta ** -exponent, theta, scaling)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    temperature = temperature_of(scaling)
    return (angles.cos() * temperature).to(dtype), (angles.sin() * temperature).to(dtype)


def rotate(hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply the rotary embedding to the first features of every head.

    Args:
        hidden: [b, heads, n, d] queries or keys.
        cosine: [b, 1, n, rotary_dim] of `rotary_angles`.
        sine: [b, 1, n, rotary_dim] of `rotary_angles`.
    """
    turned, kept = hidden.split([cosine.shape[-1], hidden.shape[-1] - cosine.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned, kept], dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor],
           cache: BlockCache | None, layer: int) -> Tensor:
    """Grouped-query attention of this call's tokens to themselves and to the cache.

    Args:
        query: [b, n, heads, d] after its norm, not rotated.
        key: [b, n, groups, d] likewise.
        value: [b, n, groups, d].
        mask: as scaled_dot_product_attention takes it, [b, 1, 1 or n, c + n]; None: everything is visible.
        rotary: [b, 1, n, rotary_dim] cosine and sine.
        cache: finished blocks, or None.
        layer: whose keys and values these are.

    Returns:
        [b, n, heads * d].
    """
    query, key = (rotate(part.transpose(1, 2), *rotary) for part in (query, key))
    value = value.transpose(1, 2)
    if cache is not None:
        key, value = cache.extend(layer, key, value)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return output.transpose(1, 2).flatten(2)


class GroupedAttention(nn.Module):
    """Grouped-query attention; queries and keys may be normalised, and the three projections have biases.

    A norm is over each head, or over all heads together with `spans_heads`.
    """

    def __init__(self, layer: int, hidden_size: int, num_heads: int, num_groups: int, head_dim: int, eps: float,
                 has_norms: bool = True, spans_heads: bool = False, has_bias: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=has_bias)
        self.k_proj = nn.Linear(hidden_size, num_groups * head_dim, bias=has_bias)
        self.v_proj = nn.Linear(hidden_size, num_groups * head_dim, bias=has_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_size, self.k_size = (n * head_dim if spans_heads else head_dim for n in (num_heads, num_groups))
        self.q_norm = RMSNorm(self.q_size, eps) if has_norms else nn.Identity()
        self.k_norm = RMSNorm(self.k_size, eps) if has_norms else nn.Identity()

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor],
                cache: BlockCache | None) -> Tensor:
        """Attend from `hidden` [b, n, h] to itself and the cache; the other arguments are those of `attend`."""
        query = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.q_size))).flatten(-2)
        key = self.k_norm(self.k_proj(hidden).unflatten(-1, (-1, self.k_size))).flatten(-2)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, self.v_proj(hidden)))
        return self.o_proj(attend(query, key, value, mask, rotary, cache, self.layer))


class SoftmaxExperts(nn.Module):
    """Experts chosen by a softmax router, in fp32."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, num_chosen: int,
                 is_normalised: bool) -> None:
        super().__init__()
        self.num_chosen = num_chosen
        self.is_normalised = is_normalised
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(GatedMLP(hidden_size, intermediate_size) for _ in range(num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` [b, n, h] to the same shape."""
        tokens = hidden.flatten(0, 1)
        scores = F.linear(tokens.float(), self.gate.weight.float()).softmax(dim=-1)
        weights, expert_ids = scores.topk(self.num_chosen, dim=-1)
        if self.is_normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return run_experts(tokens, expert_ids, weights, self.experts).view_as(hidden)


def run_experts(tokens: Tensor, expert_ids: Tensor, weights: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """The weighted sum of every token's experts; each expert runs once, on its own tokens.

    Args:
        tokens: [tokens, h] hidden states.
        expert_ids: [tokens, k] int64, of the experts chosen.
        weights: [tokens, k] fp32, of these experts.
        experts: all of them.

    Returns:
        [tokens, h] in the dtype of `tokens`.
    """
    order = expert_ids.flatten().argsort(stable=True)
    counts = torch.bincount(expert_ids.flatten(), minlength=len(experts)).tolist()
    token_of_row = order // expert_ids.shape[1]
    outputs = [experts[expert](rows) for expert, rows in enumerate(tokens[token_of_row].split(counts))
               if counts[expert]]
    scaled = torch.cat(outputs).float() * weights.flatten()[order].unsqueeze(1)
    return torch.zeros_like(tokens, dtype=torch.float32).index_add_(0, token_of_row, scaled).to(tokens.dtype)

"""LLaDA2 in plain PyTorch: a bidirectional mixture-of-experts transformer that decodes block by block.

Loads with `trust_remote_code=True` under transformers 4.57 and 5.x. Position i predicts token i, where the
input holds the mask token. Shapes: b batch, n tokens of this call, h hidden, d head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block_diffusion_generation import BlockGenerationMixin
from .block_diffusion_layers import BlockCache, GatedMLP, RMSNorm, attend, run_experts
from .block_diffusion_model import BlockDiffusionLM, BlockDiffusionModel
from .configuration_llada2_moe import LLaDA2MoeConfig


class LLaDA2MoeGate(nn.Linear):
    """Router: sigmoid scores, a bias for choosing only, experts from the best groups only. In fp32."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.config = config
        if config.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        else:
            self.expert_bias = None

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move the bias with the model but keep its bits: rounding it would route tokens to other experts."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias.dtype != torch.float32:
            device = self.expert_bias.device
            self.expert_bias = torch.empty_like(bias, device=device) if bias.is_meta else bias.to(device)
        return self

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts for `hidden` [tokens, h]; returns ids [tokens, k] and weights [tokens, k] fp32."""
        config = self.config
        scores = torch.sigmoid(F.linear(hidden.float(), self.weight.float()))
        choice = scores if self.expert_bias is None else scores + self.expert_bias
        if config.n_group > 1:
            grouped = choice.view(-1, config.n_group, config.num_experts // config.n_group)
            group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
            best = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
            is_out = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
            choice = grouped.masked_fill(is_out.unsqueeze(-1), float("-inf")).flatten(1)
        expert_ids = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(1, expert_ids)
        if config.num_experts_per_tok > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return expert_ids, weights * config.routed_scaling_factor


class LLaDA2MoeSparseMoeBlock(nn.Module):
    """Routed experts and, beside them, a shared one for every token."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.gate = LLaDA2MoeGate(config)
        size = config.moe_intermediate_size
        self.experts = nn.ModuleList(GatedMLP(config.hidden_size, size) for _ in range(config.num_experts))
        self.shared_experts = None
        if config.num_shared_experts:
            self.shared_experts = GatedMLP(config.hidden_size, size * config.num_shared_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` [b, n, h] to the same shape."""
        tokens = hidden.flatten(0, 1)
        result = run_experts(tokens, *self.gate(tokens), self.experts).view_as(hidden)
        return result if self.shared_experts is None else result + self.shared_experts(hidden)


class LLaDA2MoeAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys; rotary embedding on part of each head."""

    def __init__(self, config: LLaDA2MoeConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.sizes = [heads * size, groups * size, groups * size]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(size, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.dense = nn.Linear(heads * size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor],
                cache: BlockCache | None) -> Tensor:
        """Attend from `hidden` [b, n, h] to itself and the cache; the other arguments are those of `attend`."""
        b, n, _ = hidden.shape
        query, key, value = (part.view(b, n, -1, self.config.head_dim) for part in
                             self.query_key_value(hidden).split(self.sizes, dim=-1))
        if self.config.use_qk_norm:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        return self.dense(attend(query, key, value, mask, rotary, cache, self.layer))


class LLaDA2MoeDecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: LLaDA2MoeConfig, layer: int) -> None:
        super().__init__()
        is_dense = layer < config.first_k_dense_replace
        self.attention = LLaDA2MoeAttention(config, layer)
        self.mlp = (GatedMLP(config.hidden_size, config.intermediate_size) if is_dense
                    else LLaDA2MoeSparseMoeBlock(config))
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor],
                cache: BlockCache | None) -> Tensor:
        """Map `hidden` [b, n, h] to the same shape; the other arguments are those of `attend`."""
        hidden = hidden + self.attention(self.input_layernorm(hidden), mask, rotary, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class LLaDA2MoeModel(BlockDiffusionModel):
    """Embedding, layers and final norm."""

    config_class = LLaDA2MoeConfig
    embedding_name = "word_embeddings"
    layer_class = LLaDA2MoeDecoderLayer
    _no_split_modules = ("LLaDA2MoeDecoderLayer",)


class LLaDA2MoeModelLM(BlockGenerationMixin, BlockDiffusionLM):
    """The model with its head, and block-diffusion decoding."""

    config_class = LLaDA2MoeConfig
    model_class = LLaDA2MoeModel
    _no_split_modules = ("LLaDA2MoeDecoderLayer",)
    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012 (transformers' form)

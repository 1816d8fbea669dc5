"""SDAR in plain PyTorch: Qwen3's layers, dense or with experts, as a bidirectional model that decodes block by block.

Loads with `trust_remote_code=True` under transformers 4.57 and 5.x. Position i predicts token i, where the
input holds the mask token. Shapes: b batch, n tokens of this call, h hidden, d head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .block_diffusion_generation import BlockGenerationMixin
from .block_diffusion_layers import BlockCache, GatedMLP, RMSNorm, attend, run_experts
from .block_diffusion_model import BlockDiffusionLM, BlockDiffusionModel
from .configuration_sdar import SDARConfig, SDARMoeConfig


class SDARSparseMoeBlock(nn.Module):
    """Experts chosen by a softmax router, in fp32."""

    def __init__(self, config: SDARMoeConfig) -> None:
        super().__init__()
        self.num_chosen = config.num_experts_per_tok
        self.is_normalised = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(GatedMLP(config.hidden_size, config.moe_intermediate_size)
                                     for _ in range(config.num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `hidden` [b, n, h] to the same shape."""
        tokens = hidden.flatten(0, 1)
        scores = F.linear(tokens.float(), self.gate.weight.float()).softmax(dim=-1)
        weights, expert_ids = scores.topk(self.num_chosen, dim=-1)
        if self.is_normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return run_experts(tokens, expert_ids, weights, self.experts).view_as(hidden)


class SDARAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys; rotary embedding on the whole of each head."""

    def __init__(self, config: SDARConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * size, bias=False)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(size, config.rms_norm_eps)
        self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor],
                cache: BlockCache | None) -> Tensor:
        """Attend from `hidden` [b, n, h] to itself and the cache; the other arguments are those of `attend`."""
        query, key, value = (project(hidden).unflatten(-1, (-1, self.head_dim))
                             for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(self.q_norm(query), self.k_norm(key), value, mask, rotary, cache, self.layer))


class SDARDecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: SDARConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SDARAttention(config, layer)
        self.mlp = self.make_mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @staticmethod
    def make_mlp(config: SDARConfig) -> nn.Module:
        """What follows the attention."""
        return GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor],
                cache: BlockCache | None) -> Tensor:
        """Map `hidden` [b, n, h] to the same shape; the other arguments are those of `attend`."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), mask, rotary, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class SDARMoeDecoderLayer(SDARDecoderLayer):
    """The same with experts."""

    @staticmethod
    def make_mlp(config: SDARMoeConfig) -> nn.Module:
        """What follows the attention."""
        return SDARSparseMoeBlock(config)


class SDARModel(BlockDiffusionModel):
    """Embedding, layers and final norm."""

    config_class = SDARConfig
    embedding_name = "embed_tokens"
    layer_class = SDARDecoderLayer
    _no_split_modules = ("SDARDecoderLayer",)


class SDARMoeModel(SDARModel):
    """The same with experts in every layer."""

    config_class = SDARMoeConfig
    layer_class = SDARMoeDecoderLayer
    _no_split_modules = ("SDARMoeDecoderLayer",)


class SDARForCausalLM(BlockGenerationMixin, BlockDiffusionLM):
    """The model with its head, and block-diffusion decoding."""

    config_class = SDARConfig
    model_class = SDARModel
    _no_split_modules = ("SDARDecoderLayer",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' form)


class SDARMoeForCausalLM(SDARForCausalLM):
    """The same with experts in every layer."""

    config_class = SDARMoeConfig
    model_class = SDARMoeModel
    _no_split_modules = ("SDARMoeDecoderLayer",)

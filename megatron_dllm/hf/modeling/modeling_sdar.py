"""SDAR in plain PyTorch: Qwen3's layers, dense or with experts, as a bidirectional model that decodes block by block.

Loads with `trust_remote_code=True` under transformers 4.57 and 5.x. Position i predicts token i, where the
input holds the mask token. Shapes: b batch, n tokens of this call, h hidden, d head.
"""

from __future__ import annotations

from torch import Tensor, nn

from .block_diffusion_generation import BlockGenerationMixin
from .block_diffusion_layers import BlockCache, GatedMLP, GroupedAttention, RMSNorm, SoftmaxExperts
from .block_diffusion_model import BlockDiffusionLM, BlockDiffusionModel
from .configuration_sdar import SDARConfig, SDARMoeConfig


class SDARDecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: SDARConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = GroupedAttention(layer, config.hidden_size, config.num_attention_heads,
                                          config.num_key_value_heads, config.head_dim, config.rms_norm_eps)
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
        return SoftmaxExperts(config.hidden_size, config.moe_intermediate_size, config.num_experts,
                              config.num_experts_per_tok, config.norm_topk_prob)


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

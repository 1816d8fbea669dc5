"""Llama's layers, and those of its kin, as a bidirectional model that decodes block by block, in plain PyTorch.

For models that were converted from Llama, Qwen2, Mistral, Mixtral or OLMoE, whose layers no published diffusion class
has. Loads with `trust_remote_code=True` under transformers 4.57 and 5.x. Position i predicts token i, where the input
holds the mask token. Shapes: b batch, n tokens of this call, h hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from .block_diffusion_generation import BlockGenerationMixin
from .block_diffusion_layers import BlockCache, GatedMLP, GroupedAttention, RMSNorm, SoftmaxExperts
from .block_diffusion_model import BlockDiffusionLM, BlockDiffusionModel
from .configuration_megatron_dllm import MegatronDllmConfig


class MegatronDllmDecoderLayer(nn.Module):
    """Attention and MLP, or experts, each after a norm and around a residual."""

    def __init__(self, config: MegatronDllmConfig, layer: int) -> None:
        super().__init__()
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = GroupedAttention(layer, hidden_size, config.num_attention_heads, config.num_key_value_heads,
                                          config.head_dim, eps, config.use_qk_norm, config.qk_norm_spans_heads,
                                          config.qkv_bias)
        if config.num_experts and layer >= config.first_k_dense_replace:
            self.mlp: nn.Module = SoftmaxExperts(hidden_size, config.moe_intermediate_size, config.num_experts,
                                                 config.num_experts_per_tok, config.norm_topk_prob)
        else:
            self.mlp = GatedMLP(hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)

    def forward(self, hidden: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor],
                cache: BlockCache | None) -> Tensor:
        """Map `hidden` [b, n, h] to the same shape; the other arguments are those of `attend`."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), mask, rotary, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class MegatronDllmModel(BlockDiffusionModel):
    """Embedding, layers and final norm."""

    config_class = MegatronDllmConfig
    embedding_name = "embed_tokens"
    layer_class = MegatronDllmDecoderLayer
    _no_split_modules = ("MegatronDllmDecoderLayer",)


class MegatronDllmForCausalLM(BlockGenerationMixin, BlockDiffusionLM):
    """The model with its head, and block-diffusion decoding."""

    config_class = MegatronDllmConfig
    model_class = MegatronDllmModel
    _no_split_modules = ("MegatronDllmDecoderLayer",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' form)

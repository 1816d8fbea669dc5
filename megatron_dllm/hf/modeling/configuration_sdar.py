"""Configuration of SDAR: block diffusion on Qwen3's layers (loads under transformers 4.57 and 5.x)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from .rotary_scaling import scaling_of

# Settings of Qwen3's files that SDAR's layers do not have: the only value each may take.
_MUST_BE = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1,
            "mlp_only_layers": []}


class SDARConfig(PretrainedConfig):
    """Sizes of the dense model; keys as in Qwen3's checkpoints. `block_length` tokens are denoised together."""

    model_type = "sdar"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2048,
        intermediate_size: int = 6144,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int | None = None,
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        mask_token_id: int = 151669,
        block_length: int = 4,
        pad_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, only in _MUST_BE.items():
            value = kwargs.get(name)
            if value is not None and value != only:
                raise ValueError(f"{name} ({value}) must be {only}: SDAR's layers have nothing else.")
        rope = kwargs.pop("rope_parameters", None) or {}
        scaling = scaling_of(rope_scaling or rope)
        # transformers 5 keeps it in rope_parameters, SGLang reads it as an attribute and would take 10000 without.
        theta = rope.get("rope_theta") if rope_theta is None else rope_theta
        if theta is None:
            theta = 1000000.0
        elif rope.get("rope_theta", theta) != theta:
            raise ValueError(f"rope_theta ({theta}) contradicts rope_parameters ({rope}); correct whichever is wrong.")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rotary_dim = self.head_dim
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = theta
        self.rope_parameters = {"rope_type": "default", "rope_theta": theta, **scaling}
        self.mask_token_id = mask_token_id
        self.block_length = block_length
        super().__init__(pad_token_id=pad_token_id, eos_token_id=eos_token_id, tie_word_embeddings=tie_word_embeddings,
                         **kwargs)
        if not hasattr(self, "rope_scaling"):  # in transformers 5 it is another name of rope_parameters
            self.rope_scaling = scaling or None


class SDARMoeConfig(SDARConfig):
    """Sizes of the model with `num_experts` experts of `moe_intermediate_size` in every layer."""

    model_type = "sdar_moe"

    def __init__(
        self,
        num_experts: int = 128,
        num_experts_per_tok: int = 8,
        moe_intermediate_size: int = 768,
        norm_topk_prob: bool = True,
        **kwargs: Any,
    ) -> None:
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        super().__init__(**kwargs)

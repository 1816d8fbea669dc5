"""Configuration of block diffusion on the layers of Llama, Qwen, Mistral or Mixtral (transformers 4.57 and 5.x)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from .rotary_scaling import scaling_of

# Settings that these layers do not have: the only value each may take.
_MUST_BE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
            "sliding_window": None}


class MegatronDllmConfig(PretrainedConfig):
    """Sizes; `block_length` tokens are denoised together.

    Queries and keys are normalised with `use_qk_norm`, each head by itself unless `qk_norm_spans_heads`; they have
    biases, as values do, with `qkv_bias`. Where there are `num_experts` experts, the layers from
    `first_k_dense_replace` on have them.
    """

    model_type = "megatron_dllm"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 32,
        head_dim: int | None = None,
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        partial_rotary_factor: float = 1.0,
        use_qk_norm: bool = False,
        qk_norm_spans_heads: bool = False,
        qkv_bias: bool = False,
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        moe_intermediate_size: int = 0,
        norm_topk_prob: bool = True,
        first_k_dense_replace: int = 0,
        mask_token_id: int | None = None,
        block_length: int = 32,
        pad_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, only in _MUST_BE.items():
            value = kwargs.get(name)
            if value is not None and value != only:
                raise ValueError(f"{name} ({value}) must be {only}: these layers have nothing else.")
        rope = kwargs.pop("rope_parameters", None) or {}
        scaling = scaling_of(rope_scaling or rope)
        # transformers 5 keeps it in rope_parameters, and writes both.
        theta = rope.get("rope_theta") if rope_theta is None else rope_theta
        if theta is None:
            theta = 10000.0
        elif rope.get("rope_theta", theta) != theta:
            raise ValueError(f"rope_theta ({theta}) contradicts rope_parameters ({rope}); correct whichever is wrong.")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.partial_rotary_factor = partial_rotary_factor
        self.rotary_dim = int(self.head_dim * partial_rotary_factor)
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_qk_norm = use_qk_norm
        self.qk_norm_spans_heads = qk_norm_spans_heads
        self.qkv_bias = qkv_bias
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.first_k_dense_replace = first_k_dense_replace
        self.rope_theta = theta
        self.rope_parameters = {"rope_type": "default", "rope_theta": theta,
                                "partial_rotary_factor": partial_rotary_factor, **scaling}
        self.mask_token_id = mask_token_id
        self.block_length = block_length
        super().__init__(pad_token_id=pad_token_id, eos_token_id=eos_token_id, tie_word_embeddings=tie_word_embeddings,
                         **kwargs)
        if not hasattr(self, "rope_scaling"):  # in transformers 5 it is another name of rope_parameters
            self.rope_scaling = scaling or None

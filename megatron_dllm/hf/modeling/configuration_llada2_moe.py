"""Configuration of LLaDA2: a block-diffusion mixture of experts (loads under transformers 4.57 and 5.x)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from .rotary_scaling import scaling_of


class LLaDA2MoeConfig(PretrainedConfig):
    """Sizes of the model; keys as in the published checkpoints.

    `first_k_dense_replace` layers from the bottom have a dense MLP of `intermediate_size`, the others
    `num_experts` experts of `moe_intermediate_size`. `block_length` tokens are denoised together.
    """

    model_type = "llada2_moe"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 4,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        partial_rotary_factor: float | None = None,
        rotary_dim: int | None = None,
        use_qk_norm: bool = True,
        first_k_dense_replace: int = 1,
        num_experts: int = 256,
        num_experts_per_tok: int = 8,
        num_shared_experts: int = 1,
        moe_intermediate_size: int = 512,
        n_group: int = 8,
        topk_group: int = 4,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 2.5,
        score_function: str = "sigmoid",
        router_dtype: str = "fp32",
        moe_router_enable_expert_bias: bool = True,
        mask_token_id: int = 156895,
        block_length: int = 32,
        pad_token_id: int | None = 156892,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        rope = kwargs.pop("rope_parameters", None) or {}
        scaling = scaling_of(rope_scaling or rope)
        for name, value in (("rope_theta", rope_theta), ("partial_rotary_factor", partial_rotary_factor)):
            if value is not None and rope.get(name, value) != value:
                raise ValueError(f"{name} ({value}) contradicts rope_parameters ({rope}); correct whichever is wrong.")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        # transformers 5 keeps these two in rope_parameters.
        self.rope_theta = rope_theta if rope_theta is not None else rope.get("rope_theta", 600000.0)
        factor = partial_rotary_factor if partial_rotary_factor is not None else rope.get("partial_rotary_factor")
        if factor is None:
            factor = rotary_dim / self.head_dim if rotary_dim else 1.0
        self.partial_rotary_factor = factor
        self.rotary_dim = int(self.head_dim * factor)
        self.rope_parameters = {"rope_type": "default", "rope_theta": self.rope_theta, "partial_rotary_factor": factor,
                                **scaling}
        self.use_qk_norm = use_qk_norm
        self.first_k_dense_replace = first_k_dense_replace
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.num_shared_experts = num_shared_experts
        self.moe_intermediate_size = moe_intermediate_size
        self.n_group = n_group
        self.topk_group = topk_group
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.score_function = score_function
        self.router_dtype = router_dtype
        self.moe_router_enable_expert_bias = moe_router_enable_expert_bias
        self.mask_token_id = mask_token_id
        self.block_length = block_length
        eos_token_id = pad_token_id if eos_token_id is None else eos_token_id
        super().__init__(pad_token_id=pad_token_id, eos_token_id=eos_token_id, tie_word_embeddings=tie_word_embeddings,
                         **kwargs)
        if not hasattr(self, "rope_scaling"):  # in transformers 5 it is another name of rope_parameters
            self.rope_scaling = scaling or None

"""The transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from omegaconf import MISSING

from megatron_dllm.config.rotary_scaling import RotaryScalingConfig
from megatron_dllm.config.rules import check, check_choice, check_positive

FAMILIES = (
    "bailing_moe",
    "llada2_moe",
    "qwen3_moe",
    "sdar_moe",
    "qwen3",
    "sdar",
    "qwen2",
    "llama",
    "mistral",
    "mixtral",
    "olmoe",
    "megatron_dllm",
)
SCORE_FUNCTIONS = ("sigmoid", "softmax")
# What megatron-core's router computes its scores in.
ROUTER_DTYPES = ("fp32", "fp64")
# Far above any published model: a larger number is a mistake, and would be noticed only after names for it were made.
_LARGEST = {
    "num_layers": 1024,
    "hidden_size": 2**20,
    "ffn_hidden_size": 2**22,
    "num_attention_heads": 2**14,
    "num_query_groups": 2**14,
    "kv_channels": 2**14,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31,
}
_LARGEST_OF_EXPERTS = {"num_moe_experts": 2**14, "moe_ffn_hidden_size": 2**22, "moe_router_topk": 2**14}
# Experts of all layers together; the largest published models have some 25,000.
_MOST_EXPERTS = 2**17


@dataclass
class ModelConfig:
    """The transformer, in megatron-core's names; `family` names the HF tensor layout it came from.

    Sizes are counts of features unless said otherwise. `num_dense_layers` layers from the bottom
    have a dense MLP, the others a mixture of experts (`num_moe_experts == 0`: all dense).
    """

    # Layout of the tensors in Hugging Face format: bailing_moe, llada2_moe, qwen3_moe, sdar_moe, qwen3, sdar, qwen2,
    # llama, mistral, mixtral, olmoe, or megatron_dllm for the class of our own exports.
    family: str = "bailing_moe"
    # Transformer layers.
    num_layers: int = MISSING
    # Features of a token between the layers.
    hidden_size: int = MISSING
    # Features inside a dense MLP.
    ffn_hidden_size: int = MISSING
    # Attention heads (queries).
    num_attention_heads: int = MISSING
    # Heads of keys and values; each serves the same number of attention heads.
    num_query_groups: int = MISSING
    # Features of a head.
    kv_channels: int = MISSING
    # Rows of the embedding and of the output layer.
    vocab_size: int = MISSING
    # Longest sequence that the model was made for, in tokens.
    max_position_embeddings: int = 32768
    # Normalise queries and keys of each head.
    qk_layernorm: bool = True
    # Normalise the queries of all heads together, and so the keys, with qk_layernorm (OLMoE).
    qk_layernorm_spans_heads: bool = False
    # Biases in the projections to queries, keys and values (Qwen2 and 2.5 have them).
    add_qkv_bias: bool = False
    # Added to the mean square in every RMSNorm.
    layernorm_epsilon: float = 1e-6
    # Base of the rotary frequencies (HF: rope_theta).
    rotary_base: float = 600000.0
    # Share of a head's features that is rotated, in (0, 1] (HF: partial_rotary_factor).
    rotary_percent: float = 0.5
    # Stretches the rotary embedding to longer contexts (HF: rope_scaling); null: as it was trained.
    rotary_scaling: RotaryScalingConfig | None = None
    # The output layer is the embedding.
    tie_word_embeddings: bool = False
    # Layers from the bottom that have a dense MLP.
    num_dense_layers: int = 0
    # Routed experts of a layer; 0: a dense model.
    num_moe_experts: int = 0
    # Features inside a routed expert.
    moe_ffn_hidden_size: int = 0
    # Features inside the shared expert; 0: there is none.
    moe_shared_expert_intermediate_size: int = 0
    # Routed experts that each token passes through.
    moe_router_topk: int = 0
    # Groups that the experts of a layer form for routing; 0: none.
    moe_router_num_groups: int = 0
    # Groups among which a token chooses its experts.
    moe_router_group_topk: int = 0
    # Factor on the experts' weights after they have been normalised.
    moe_router_topk_scaling_factor: float = 1.0
    # How scores come from logits of the router: sigmoid or softmax.
    moe_router_score_function: str = "sigmoid"
    # Take the softmax before the best experts are chosen, not over the chosen.
    moe_router_pre_softmax: bool = False
    # A bias for each expert that counts when experts are chosen, not in their weights.
    moe_router_enable_expert_bias: bool = True
    # Precision of the router: fp32.
    moe_router_dtype: str = "fp32"
    # Standard deviation of random initial weights.
    init_method_std: float = 0.02
    # Token that stands for one not known yet.
    mask_token_id: int = MISSING
    # Token that ends a document.
    eos_token_id: int = MISSING
    # Token that fills the rest of a row.
    pad_token_id: int = MISSING

    def stretched(self, scaling: RotaryScalingConfig | None) -> ModelConfig:
        """The model with another rotary scaling, and positions as far as it reaches; None: as it is."""
        if scaling is None:
            return self
        longest = max(self.max_position_embeddings, scaling.stretched_length)
        return replace(self, rotary_scaling=scaling, max_position_embeddings=longest)

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return self.num_moe_experts > 0

    def validate(self) -> None:
        """Raise ValueError if sizes contradict each other, or if megatron-core would compute something else than HF."""
        check_choice("model.family", self.family, FAMILIES)
        for name, largest in _LARGEST.items():
            self._check_size(name, largest)
        check(
            self.num_attention_heads % self.num_query_groups == 0,
            f"model.num_query_groups ({self.num_query_groups}) must divide num_attention_heads "
            f"({self.num_attention_heads}); every query group serves the same number of heads.",
        )
        check(
            0.0 < self.rotary_percent <= 1.0,
            f"model.rotary_percent ({self.rotary_percent}) must lie in (0, 1]; it is HF's partial_rotary_factor.",
        )
        rotated = int(self.kv_channels * self.rotary_percent)
        check(
            rotated > 0 and rotated % 2 == 0,
            f"model.kv_channels ({self.kv_channels}) x rotary_percent ({self.rotary_percent}) = {rotated} must be even "
            "and at least 2; rotary embedding turns features in pairs.",
        )
        if self.rotary_scaling is not None:
            self.rotary_scaling.validate("model.rotary_scaling", self.max_position_embeddings)
        check(
            self.qk_layernorm or not self.qk_layernorm_spans_heads,
            "model.qk_layernorm_spans_heads (true) needs qk_layernorm, which it says more of; set that to true.",
        )
        self._validate_numbers()
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            check(
                0 <= value < self.vocab_size,
                f"model.{name} ({value}) must lie in [0, vocab_size) = [0, {self.vocab_size}); "
                "take it from the tokenizer.",
            )
        check(
            self.mask_token_id != self.eos_token_id,
            f"model.mask_token_id ({self.mask_token_id}) equals eos_token_id; "
            "the mask token must be a token of its own.",
        )
        check(
            self.num_moe_experts >= 0,
            f"model.num_moe_experts ({self.num_moe_experts}) must not be negative; 0 makes a dense model.",
        )
        if self.is_moe:
            self._validate_moe()

    def _check_size(self, name: str, largest: int) -> None:
        value = getattr(self, name)
        check_positive(f"model.{name}", value)
        check(
            value <= largest,
            f"model.{name} ({value}) must not exceed {largest}; no published model comes near it: correct the value.",
        )

    def _validate_numbers(self) -> None:
        for name, low, high in (
            ("layernorm_epsilon", 0.0, 0.1),
            ("rotary_base", 1.0, 1e12),
            ("moe_router_topk_scaling_factor", 0.0, 1e6),
        ):
            value = getattr(self, name)
            check(
                low < value < high,
                f"model.{name} ({value}) must lie between {low:g} and {high:g}; take it from the model's config.json.",
            )
        check(
            0.0 <= self.init_method_std < math.inf,
            f"model.init_method_std ({self.init_method_std}) must be a number of at least 0.",
        )

    def _validate_moe(self) -> None:
        for name, largest in _LARGEST_OF_EXPERTS.items():
            self._check_size(name, largest)
        check(
            self.num_layers * self.num_moe_experts <= _MOST_EXPERTS,
            f"model.num_moe_experts ({self.num_moe_experts}) x num_layers ({self.num_layers}) must not exceed "
            f"{_MOST_EXPERTS}; no published model comes near it: correct the values.",
        )
        check(
            0 <= self.moe_shared_expert_intermediate_size <= _LARGEST["ffn_hidden_size"],
            f"model.moe_shared_expert_intermediate_size ({self.moe_shared_expert_intermediate_size}) must lie in "
            f"[0, {_LARGEST['ffn_hidden_size']}]; 0 means no shared experts.",
        )
        check_choice("model.moe_router_dtype", self.moe_router_dtype, ROUTER_DTYPES)
        check_choice("model.moe_router_score_function", self.moe_router_score_function, SCORE_FUNCTIONS)
        check(
            0 <= self.num_dense_layers < self.num_layers,
            f"model.num_dense_layers ({self.num_dense_layers}) must lie in [0, num_layers) = "
            f"[0, {self.num_layers}); for a dense model set num_moe_experts to 0.",
        )
        check(
            0 < self.moe_router_topk <= self.num_moe_experts,
            f"model.moe_router_topk ({self.moe_router_topk}) must lie in [1, num_moe_experts] = "
            f"[1, {self.num_moe_experts}].",
        )
        if self.moe_router_num_groups:
            check_positive("model.moe_router_num_groups", self.moe_router_num_groups)
            check(
                self.num_moe_experts % self.moe_router_num_groups == 0,
                f"model.moe_router_num_groups ({self.moe_router_num_groups}) must divide num_moe_experts "
                f"({self.num_moe_experts}).",
            )
            check(
                0 < self.moe_router_group_topk <= self.moe_router_num_groups,
                f"model.moe_router_group_topk ({self.moe_router_group_topk}) must lie in "
                f"[1, moe_router_num_groups] = [1, {self.moe_router_num_groups}].",
            )
            check(
                self.moe_router_topk == 2 * self.moe_router_group_topk,
                f"model.moe_router_topk ({self.moe_router_topk}) must be twice moe_router_group_topk "
                f"({self.moe_router_group_topk}): megatron-core ranks a group by its best topk/group_topk "
                "experts, the published models by its best 2, and only this ratio agrees.",
            )

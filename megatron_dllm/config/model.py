"""The transformer."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from megatron_dllm.config.rules import check, check_choice, check_positive

FAMILIES = ("bailing_moe", "llada2_moe", "qwen3_moe", "sdar_moe", "qwen3")
SCORE_FUNCTIONS = ("sigmoid", "softmax")


@dataclass
class ModelConfig:
    """The transformer, in megatron-core's names; `family` names the HF tensor layout it came from.

    Sizes are counts of features unless said otherwise. `num_dense_layers` layers from the bottom
    have a dense MLP, the others a mixture of experts (`num_moe_experts == 0`: all dense).
    """

    family: str = "bailing_moe"
    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING
    kv_channels: int = MISSING
    vocab_size: int = MISSING
    max_position_embeddings: int = 32768
    qk_layernorm: bool = True
    layernorm_epsilon: float = 1e-6
    rotary_base: float = 600000.0
    rotary_percent: float = 0.5
    tie_word_embeddings: bool = False
    num_dense_layers: int = 0
    num_moe_experts: int = 0
    moe_ffn_hidden_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_router_topk: int = 0
    moe_router_num_groups: int = 0
    moe_router_group_topk: int = 0
    moe_router_topk_scaling_factor: float = 1.0
    moe_router_score_function: str = "sigmoid"
    moe_router_pre_softmax: bool = False
    moe_router_enable_expert_bias: bool = True
    moe_router_dtype: str = "fp32"
    init_method_std: float = 0.02
    mask_token_id: int = MISSING
    eos_token_id: int = MISSING
    pad_token_id: int = MISSING

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return self.num_moe_experts > 0

    def validate(self) -> None:
        """Raise ValueError if sizes contradict each other, or if megatron-core would compute something else than HF."""
        check_choice("model.family", self.family, FAMILIES)
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
        ):
            check_positive(f"model.{name}", getattr(self, name))
        check(
            self.num_attention_heads % self.num_query_groups == 0,
            f"model.num_query_groups ({self.num_query_groups}) must divide num_attention_heads "
            f"({self.num_attention_heads}); every query group serves the same number of heads.",
        )
        check(
            0.0 < self.rotary_percent <= 1.0,
            f"model.rotary_percent ({self.rotary_percent}) must lie in (0, 1]; it is HF's partial_rotary_factor.",
        )
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
        if self.is_moe:
            self._validate_moe()

    def _validate_moe(self) -> None:
        check_choice("model.moe_router_score_function", self.moe_router_score_function, SCORE_FUNCTIONS)
        check(
            0 <= self.num_dense_layers < self.num_layers,
            f"model.num_dense_layers ({self.num_dense_layers}) must lie in [0, num_layers) = "
            f"[0, {self.num_layers}); for a dense model set num_moe_experts to 0.",
        )
        check_positive("model.moe_ffn_hidden_size", self.moe_ffn_hidden_size)
        check(
            0 < self.moe_router_topk <= self.num_moe_experts,
            f"model.moe_router_topk ({self.moe_router_topk}) must lie in [1, num_moe_experts] = "
            f"[1, {self.num_moe_experts}].",
        )
        if self.moe_router_num_groups:
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

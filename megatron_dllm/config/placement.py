"""Where and how the model of a checkpoint runs while it decodes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config.model import ModelConfig
from megatron_dllm.config.parallel import PRECISIONS, ParallelConfig
from megatron_dllm.config.rotary_scaling import RotaryScalingConfig
from megatron_dllm.config.rules import check, check_choice, check_positive
from megatron_dllm.config.training import ATTENTION_BACKENDS

LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")


@dataclass
class PlacementConfig:
    """The tokenizer, the precision, the batch and the ranks of a model that decodes."""

    # Null: the one that lies beside the weights.
    tokenizer: str | None = None
    # Prompt and generated tokens together; null: the model's max_position_embeddings.
    context_length: int | None = None
    # Stretches the rotary embedding to longer contexts while decoding, in place of what the checkpoint says; the model
    # then has positions up to factor x original_max_position_embeddings. Null: the checkpoint's.
    rotary_scaling: RotaryScalingConfig | None = None
    # Null: fp32 on a CPU, bf16 on a GPU.
    precision: str | None = None
    # Implementation of attention, as training.attention_backend.
    attention_backend: str = "auto"
    # Prompts that are decoded at a time, on each replica of the model; a text does not depend on the others.
    batch_size: int = 16
    # Ranks that share the matrices of each layer (TP).
    tensor_model_parallel_size: int = 1
    # Ranks that share the layers (PP).
    pipeline_model_parallel_size: int = 1
    # Ranks that share the experts of each layer (EP).
    expert_model_parallel_size: int = 1
    # Must be 1: a text's keys and values lie whole on each rank, or split by heads with tensor_model_parallel_size.
    context_parallel_size: int = 1

    def layout(self, model: ModelConfig, world_size: int, is_cuda: bool) -> ParallelConfig:
        """The layout of the ranks.

        Args:
            model: sizes.
            world_size: number of ranks.
            is_cuda: whether there is a GPU.

        Raises:
            ValueError: the model cannot be split so, or not over so many ranks.
        """
        layout = ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            expert_model_parallel_size=self.expert_model_parallel_size,
            expert_tensor_parallel_size=1 if self.expert_model_parallel_size > 1 else None,
            sequence_parallel=self.tensor_model_parallel_size > 1 and model.is_moe,
            precision=self.precision or ("bf16" if is_cuda else "fp32"),
        )
        try:
            layout.validate(world_size, model)
        except ValueError as error:  # the keys of decoding have no group
            raise ValueError(str(error).removeprefix("parallel: ").replace("parallel.", "")) from None
        return layout

    def validate_placement(self) -> None:
        """Raise ValueError for what no model could follow."""
        for name in ("batch_size", *LAYOUT):
            check_positive(name, getattr(self, name))
        check(
            self.context_parallel_size == 1,
            f"context_parallel_size ({self.context_parallel_size}) must be 1 where texts are decoded, since the keys "
            "and values of a text are not split over its tokens; use tensor_model_parallel_size, which splits them by "
            "heads, or pipeline_model_parallel_size, by layers.",
        )
        check(
            self.context_length is None or self.context_length > 0,
            f"context_length ({self.context_length}) must be positive; null takes the checkpoint's.",
        )
        check(
            self.precision is None or self.precision in PRECISIONS,
            f"precision ({self.precision}) is not known; use one of {', '.join(PRECISIONS)}, or null.",
        )
        check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        if self.rotary_scaling is not None:
            self.rotary_scaling.validate("rotary_scaling")

"""The runs of the study of an autoregressive clean half: models, arms, and how many tokens each gets.

An AR model of 64 features is trained first, and every arm converts it by the block sizes 1, 4 and 32, in a fifth, a
fifth and the rest of its document tokens. Arms differ in the clean half, and get document tokens so that their
floating-point operations are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.study_corpus import CONTEXT_LENGTH, EOS, MASK, PAD, TEXT, TOKENIZER, VALIDATION, VOCAB_SIZE
from benchmarks.study_cost import MANY, mean_operations
from megatron_dllm.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
    TrainingConfig,
)

TARGET = 32
HELD_OUT_TOKENS = 20_000
MEASURED_ROWS = 8  # of a forward pass
SHARES = {"warmup_1": 0.2, "warmup_4": 0.2, "warmup_32": 0.35, "last": 0.25}
BLOCKS = {"warmup_1": 1, "warmup_4": 4, "warmup_32": TARGET, "last": TARGET}
LEARNING_RATE = 4e-3  # better than half and a quarter of it with the report's mask and with the guided one
ROWS = 2  # of a global batch


def model_of(width: int) -> ModelConfig:
    """A mixture of experts in small; its weights grow with the square of its features."""
    return ModelConfig(
        num_layers=4,
        hidden_size=width,
        ffn_hidden_size=3 * width,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=width // 8 * 2,  # rotated in pairs
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=512,
        num_dense_layers=1,
        num_moe_experts=8,
        moe_ffn_hidden_size=3 * width // 4,
        moe_shared_expert_intermediate_size=3 * width // 4,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=2.5,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


# The second size has three times the weights of the first.
SIZES = {"tiny": model_of(64), "triple": model_of(116)}


@dataclass(frozen=True)
class Arm:
    """One way to convert.

    Attributes:
        clean_block_size: of the clean half; None: the noisy half's.
        ar_weight: of the AR loss.
        returns: the last stage has the blocks that a server computes, without an AR loss.
        budget: share of the operations.
    """

    clean_block_size: int | None = None
    ar_weight: float = 0.0
    returns: bool = False
    budget: float = 1.0

    def stages(self, num_tokens: float, rows: int = ROWS) -> dict[str, StageConfig]:
        """Its stages, with so many document tokens together and so many rows in a step."""
        stages = {}
        for name, share in SHARES.items():
            is_plain = self.returns and name == "last"
            stages[name] = StageConfig(
                block_size=BLOCKS[name],
                num_tokens=round(share * num_tokens),
                global_batch_size=rows,
                micro_batch_size=rows,
                learning_rate=LEARNING_RATE,
                lr_warmup_share=0.2 if name == "warmup_1" else 0.0,
                lr_shape="cosine" if name == "last" else "constant",
                final_learning_rate=LEARNING_RATE / 10 if name == "last" else None,
                clean_block_size=None if is_plain else self.clean_block_size,
                ar_weight=0.0 if is_plain else self.ar_weight,
            )
        return stages


def arms(weights: Sequence[float]) -> dict[str, Arm]:
    """The arms of the study by name; those that decide the claim, with the first weight of the AR loss, come first."""
    first, *others = weights
    found = {
        "block": Arm(),
        f"returned {first:g}, half": Arm(1, first, returns=True, budget=0.5),
        f"returned {first:g}": Arm(1, first, returns=True),
        f"guided {first:g}": Arm(1, first),
        "causal": Arm(1),
    }
    for weight in others:
        found |= {f"returned {weight:g}": Arm(1, weight, returns=True), f"guided {weight:g}": Arm(1, weight)}
    return found


def arm_run(
    folder: Path, name: str, model: ModelConfig, arm: Arm, seed: int, num_tokens: int, rows: int
) -> TrainConfig:
    """The conversion by an arm, with its share of the operations of `num_tokens` in blocks of the report.

    Args:
        folder: of the runs of this model and these lengths.
        name: of the run.
        model: sizes.
        arm: how it converts.
        seed: of order and noise.
        num_tokens: document tokens of the arm with the report's mask.
        rows: of a step.
    """
    per_token = [mean_operations(run_config(folder, name, model, seed, one.stages(MANY, rows))) for one in (Arm(), arm)]
    return run_config(
        folder, name, model, seed, arm.stages(arm.budget * num_tokens * per_token[0] / per_token[1], rows)
    )


def run_config(folder: Path, name: str, model: ModelConfig, seed: int, stages: dict[str, StageConfig]) -> TrainConfig:
    """A run of one stage or more, in a folder beside the corpora that `study_corpus.write_corpora` has written."""
    is_ar = any(stage.objective == "ar" for stage in stages.values())
    base = CheckpointConfig(keep_last=1, keep_best=0, timeout_minutes=60.0)
    return TrainConfig(
        run=RunConfig(name=name, root=str(folder), seed=seed, distributed_timeout_minutes=60.0),
        model=model,
        training=TrainingConfig() if is_ar else TrainingConfig(mask_embedding_noise=0.5, mask_embedding_noise_steps=30),
        data=DataConfig(
            train=str(folder.parent / TEXT),
            validation=str(folder.parent / VALIDATION),
            tokenizer=str(folder.parent / TOKENIZER),
            packing_chunk=256,
        ),
        schedule=ScheduleConfig(context_length=CONTEXT_LENGTH, stages=stages),
        optimizer=OptimizerConfig(),
        checkpoint=base if is_ar else replace(base, load=str(folder / "base")),
        evaluation=EvaluationConfig(
            block_sizes=[TARGET], num_tokens=HELD_OUT_TOKENS, micro_batch_size=MEASURED_ROWS, with_ar=True
        ),
        logging=LoggingConfig(interval_steps=10, tensorboard=False),
    )


def base_stages(num_tokens: int, rows: int = ROWS) -> dict[str, StageConfig]:
    """Those of the AR model that all arms convert; its batches are twice those of a conversion of so many rows."""
    return {
        "ar": StageConfig(
            objective="ar",
            num_tokens=num_tokens,
            global_batch_size=2 * rows,
            micro_batch_size=2 * rows,
            learning_rate=2 * LEARNING_RATE,
            lr_warmup_share=0.05,
            lr_shape="cosine",
            final_learning_rate=LEARNING_RATE / 5,
        )
    }

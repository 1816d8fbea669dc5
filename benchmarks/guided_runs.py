"""The runs of the study of an autoregressive clean half: models, corpus, arms, and their cost in operations.

A byte-level corpus of Python's own standard library and a model of 64 features: an AR model is trained first, and every
arm converts it by the block sizes 1, 4 and 32, in a fifth, a fifth and the rest of its document tokens. Arms differ in
the clean half, and get document tokens so that their floating-point operations are equal.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_dllm.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.planning.layers import Tokens, layer_cost
from megatron_dllm.planning.rows import assumed_row

CONTEXT_LENGTH, TARGET, LONGEST = 256, 32, 2000
EOS, PAD, MASK, FIRST_BYTE = 0, 1, 2, 3
HELD_OUT, HELD_OUT_TOKENS = 8, 20_000  # one document of so many is held out
SHARES = {"warmup_1": 0.2, "warmup_4": 0.2, "warmup_32": 0.35, "last": 0.25}
BLOCKS = {"warmup_1": 1, "warmup_4": 4, "warmup_32": TARGET, "last": TARGET}
LEARNING_RATE = 2e-3
_HEAD_OPERATIONS, _PRODUCT_PASSES, _ATTENTION_PASSES = 8.0, 3.0, 3.5


def model_of(width: int) -> ModelConfig:
    """A mixture of experts in small; its weights grow with the square of its features."""
    return ModelConfig(
        num_layers=4,
        hidden_size=width,
        ffn_hidden_size=3 * width,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=width // 4,
        vocab_size=256 + FIRST_BYTE + 1,
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
SIZES = {"tiny": model_of(64), "triple": model_of(112)}


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

    def stages(self, num_tokens: float) -> dict[str, StageConfig]:
        """Its stages, with so many document tokens together."""
        stages = {}
        for name, share in SHARES.items():
            is_plain = self.returns and name == "last"
            stages[name] = StageConfig(
                block_size=BLOCKS[name],
                num_tokens=round(share * num_tokens),
                global_batch_size=8,
                micro_batch_size=8,
                learning_rate=LEARNING_RATE,
                lr_warmup_share=0.2 if name == "warmup_1" else 0.0,
                lr_shape="cosine" if name == "last" else "constant",
                final_learning_rate=LEARNING_RATE / 10 if name == "last" else None,
                clean_block_size=None if is_plain else self.clean_block_size,
                ar_weight=0.0 if is_plain else self.ar_weight,
            )
        return stages


def arms(weights: list[float]) -> dict[str, Arm]:
    """The arms of the study by name, for each of the weights of the AR loss; what decides the claim comes first."""
    found = {"block": Arm()}
    for weight in weights:
        found |= {
            f"returned {weight:g}, half": Arm(1, weight, returns=True, budget=0.5),
            f"returned {weight:g}": Arm(1, weight, returns=True),
            f"guided {weight:g}": Arm(1, weight),
        }
    return found | {"causal": Arm(1)}


def operations(model: ModelConfig, stage: StageConfig) -> float:
    """Floating-point operations of a document token, forward and backward, of documents as long as the context."""
    copies = max(stage.num_noisy_copies, 1)
    schedule = ScheduleConfig(context_length=CONTEXT_LENGTH, row_length=(copies + 1) * CONTEXT_LENGTH)
    row = assumed_row(RowGeometry.of_stage(stage, schedule, DataConfig()), stage, CONTEXT_LENGTH)
    tokens = Tokens(row.length, row.length, row.pairs)
    has_experts = [layer >= model.num_dense_layers for layer in range(model.num_layers)]
    costs = [layer_cost(model, ParallelConfig(), tokens, is_moe, 1.0) for is_moe in has_experts]
    layers = sum(_PRODUCT_PASSES * cost.products + _ATTENTION_PASSES * cost.attention for cost in costs)
    head = _HEAD_OPERATIONS * model.hidden_size * model.vocab_size * row.targets
    return (layers + head) / row.document_tokens


def arm_tokens(model: ModelConfig, arm: Arm, num_tokens: int) -> float:
    """Document tokens with which an arm takes its share of the operations of `num_tokens` in blocks of the report."""

    def mean(stages: Mapping[str, StageConfig]) -> float:
        return sum(SHARES[name] * operations(model, stage) for name, stage in stages.items())

    return arm.budget * num_tokens * mean(Arm().stages(1e6)) / mean(arm.stages(1e6))


def run_config(folder: Path, name: str, model: ModelConfig, seed: int, stages: dict[str, StageConfig]) -> TrainConfig:
    """A run of one stage or more, in a folder whose corpus `write_corpora` has written."""
    is_ar = any(stage.objective == "ar" for stage in stages.values())
    base = CheckpointConfig(keep_last=1, keep_best=0, timeout_minutes=60.0)
    return TrainConfig(
        run=RunConfig(name=name, root=str(folder), seed=seed, distributed_timeout_minutes=60.0),
        model=model,
        training=TrainingConfig() if is_ar else TrainingConfig(mask_embedding_noise=0.5, mask_embedding_noise_steps=30),
        data=DataConfig(
            train=str(folder.parent / "train"), validation=str(folder.parent / "validation"), packing_chunk=256
        ),
        schedule=ScheduleConfig(context_length=CONTEXT_LENGTH, stages=stages),
        optimizer=OptimizerConfig(),
        checkpoint=base if is_ar else replace(base, load=str(folder / "base")),
        evaluation=EvaluationConfig(block_sizes=[TARGET], num_tokens=HELD_OUT_TOKENS, micro_batch_size=8, with_ar=True),
        logging=LoggingConfig(interval_steps=10, tensorboard=False),
    )


def base_stages(num_tokens: int) -> dict[str, StageConfig]:
    """Those of the AR model that all arms convert."""
    return {
        "ar": StageConfig(
            objective="ar",
            num_tokens=num_tokens,
            global_batch_size=8,
            micro_batch_size=8,
            learning_rate=4e-3,
            lr_warmup_share=0.05,
            lr_shape="cosine",
            final_learning_rate=4e-4,
        )
    }


def write_corpora(folder: Path) -> None:
    """Python's standard library as bytes, in documents of at most LONGEST; one of HELD_OUT is held out, by its hash."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    if (folder / "validation.idx").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    builders = {
        name: IndexedDatasetBuilder(f"{folder / name}.bin", dtype=np.uint16) for name in ("train", "validation")
    }
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        content = path.read_bytes()
        for start in range(0, len(content), LONGEST - 1):
            piece = content[start : start + LONGEST - 1]
            is_held_out = int(hashlib.sha256(piece).hexdigest(), 16) % HELD_OUT == 0
            tokens = np.append(np.frombuffer(piece, np.uint8).astype(np.uint16) + FIRST_BYTE, EOS).astype(np.uint16)
            builders["validation" if is_held_out else "train"].add_document(tokens, [len(tokens)])
    for name in ("train", "validation"):  # the second one is there last
        builders[name].finalize(f"{folder / name}.idx")

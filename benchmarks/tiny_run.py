"""A run of three stages and about twenty steps that takes seconds, and readers for what it writes."""

from __future__ import annotations

import json
import os
import signal
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ranks import run_ranks
from megatron_dllm.config import (
    CheckpointConfig,
    DataConfig,
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
from megatron_dllm.run.names import CHECKPOINTS, METRICS
from megatron_dllm.training.observers.metrics_file import depends_on_machine

CONTEXT_LENGTH, ROW_LENGTH = 32, 96
VOCAB_SIZE, EOS, PAD, MASK = 128, 0, 1, 2

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=512,
    num_dense_layers=1,
    num_moe_experts=8,
    moe_ffn_hidden_size=16,
    moe_shared_expert_intermediate_size=16,
    moe_router_topk=4,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    moe_router_topk_scaling_factor=2.5,
    init_method_std=0.1,
    mask_token_id=MASK,
    eos_token_id=EOS,
    pad_token_id=PAD,
)
TRAINING = TrainingConfig(moe_router_bias_update_rate=1e-3, mask_embedding_noise=0.2, mask_embedding_noise_steps=40)
DENSE = replace(MODEL, num_moe_experts=0, num_dense_layers=4)

# About 6 steps each; the second packs its rows anew in the middle of a chunk of documents.
_STAGE = StageConfig(block_size=4, num_tokens=900, global_batch_size=4, learning_rate=3e-3, lr_warmup_tokens=300)
STAGES = {
    "warmup": _STAGE,
    "stable": replace(_STAGE, block_size=CONTEXT_LENGTH, num_tokens=1800, lr_warmup_tokens=0),
    "decay": replace(
        _STAGE,
        block_size=8,
        lr_warmup_tokens=0,
        num_views=2,
        view_relation="complementary",
        t_max=0.999,
        lr_shape="cosine",
        final_learning_rate=3e-4,
    ),
}


def run_config(folder: Path, name: str, layout: ParallelConfig | None = None, **changes: Any) -> TrainConfig:
    """The run called `name` in a folder whose corpus `write_corpus` has written.

    Adam's eps is of the order of the gradients: with the usual one, an element whose gradient is nothing but rounding
    moves by a full learning rate in either direction, and two layouts could not be compared.
    """
    config = TrainConfig(
        run=RunConfig(name=name, root=str(folder / "runs"), distributed_timeout_minutes=10.0),
        model=MODEL,
        training=TRAINING,
        data=DataConfig(train=str(folder / "corpus"), packing_chunk=64),
        schedule=ScheduleConfig(context_length=CONTEXT_LENGTH, row_length=ROW_LENGTH, stages=dict(STAGES)),
        optimizer=OptimizerConfig(adam_eps=1e-3),
        parallel=layout or ParallelConfig(),
        checkpoint=CheckpointConfig(save_interval_tokens=600, keep_last=3, timeout_minutes=10.0),
        logging=LoggingConfig(interval_steps=1, tensorboard=False),
    )
    return replace(config, **changes)


def scaled_config(folder: Path, name: str, scale: float, is_async: bool = False) -> TrainConfig:
    """A run with stages `scale` times as long, saved every few steps."""
    stages = {key: replace(stage, num_tokens=int(scale * stage.num_tokens)) for key, stage in STAGES.items()}
    return run_config(
        folder,
        name,
        checkpoint=CheckpointConfig(
            save_interval_tokens=500, keep_last=2, keep_best=0, timeout_minutes=10.0, is_async=is_async
        ),
        schedule=ScheduleConfig(context_length=CONTEXT_LENGTH, row_length=ROW_LENGTH, stages=stages),
    )


def write_corpus(
    prefix: Path, num_documents: int = 400, seed: int = 0, *, median: int = 16, longest: int = 120
) -> None:
    """Random documents of log-normal length (sigma 1), some longer than a context of the run above."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=np.uint16)
    for length in np.clip(rng.lognormal(np.log(median), 1.0, num_documents).astype(int), 1, longest):
        tokens = np.append(rng.integers(MASK + 1, VOCAB_SIZE, length - 1), EOS).astype(np.uint16)
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(prefix) + ".idx")


def train_ranks(world_size: int, *arguments: Any) -> list[int]:
    """Run `train_here` on several ranks; returns their exit codes."""
    return run_ranks(train_here, world_size, *arguments, timeout_s=500.0)


def train_here(config: TrainConfig, signal_at: int | None = None, number: int = signal.SIGTERM, rank: int = 0) -> int:
    """Train on this rank; returns the exit code. One rank sends itself a signal during step `signal_at`."""
    from megatron_dllm.train import train
    from megatron_dllm.training.observers.observer import Observer
    from megatron_dllm.training.parts import Parts

    class Interruption(Observer):
        """Sends the signal before the step's forward pass."""

        num_steps = 0

        def around_step(self, is_logged: bool) -> AbstractContextManager[None]:
            """Count, and interrupt."""
            self.num_steps += 1
            if self.num_steps == signal_at and os.environ["RANK"] == str(rank):
                os.kill(os.getpid(), number)
            return nullcontext()

    return train(config, lambda: Parts(extra_observers=[Interruption()]))


def checkpoints_of(config: TrainConfig) -> Path:
    """Folder of the run's checkpoints."""
    return Path(config.run.root) / config.run.name / CHECKPOINTS


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, weights and optimizer state, whole, by its global name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.full(entry.size, 7.0, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def read_metrics(config: TrainConfig) -> list[dict[str, Any]]:
    """The run's records, without what depends on the clock and the machine."""
    path = Path(config.run.root) / config.run.name / METRICS
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if not depends_on_machine(name)} for record in records]


def read_steps(config: TrainConfig) -> list[dict[str, Any]]:
    """The records of the run's steps, without those of its validations."""
    return [record for record in read_metrics(config) if "loss" in record]


if __name__ == "__main__":  # python -m benchmarks.tiny_run FOLDER NAME SCALE IS_ASYNC: one rank, started by a launcher
    import logging
    import sys

    from megatron_dllm.train import train

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    sys.exit(train(scaled_config(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4] == "1")))

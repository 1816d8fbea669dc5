"""Engines and checkpoints for the tests of checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.tiny_run import MODEL, run_config
from megatron_dllm.checkpoint.meta import CheckpointMeta, Position, Provenance, Semantics
from megatron_dllm.config import ModelConfig, ParallelConfig

OPTIMIZER_STEP = 7
# Position of the rows of `run_config` before the first one, in the corpus that `write_corpus` writes.
_BEGINNING = {
    "epoch": 0,
    "chunk_index": 0,
    "num_pieces_before": 0,
    "emitted": [],
    "identity": {"num_documents": 400, "seed": 1234, "chunk": 64, "shuffle": True},
}


def build(folder: Path, layout: ParallelConfig, model: ModelConfig = MODEL) -> Any:
    """An engine on this layout; it replaces the process groups of the one before."""
    from megatron.core import parallel_state

    from megatron_dllm.parallel import groups
    from megatron_dllm.training.engine import build_engine

    parallel_state.destroy_model_parallel()
    config = run_config(folder, "run", layout, model=model)
    return build_engine(config, groups.initialize(config.parallel, config.run))


def writer_of(folder: Path, **options: Any) -> Any:
    """A writer of the run's checkpoints."""
    from megatron_dllm.checkpoint.saving import CheckpointWriter
    from megatron_dllm.parallel.groups import Groups

    return CheckpointWriter(folder / "runs" / "run" / "checkpoints", Groups.current().data_context, **options)


def save(writer: Any, step: int, engine: Any) -> Path:
    """Write a checkpoint."""
    meta = CheckpointMeta(
        asdict(MODEL),
        Semantics(
            shift=False, block_origin="document", mask_token_id=MODEL.mask_token_id, block_size=32, context_length=32
        ),
        Position(step=step, stage="stable", consumed_tokens=900),
        Provenance(layout={"precision": "fp32"}),
    )
    state = {"optimizer_step": OPTIMIZER_STEP, "step": step, "consumed_tokens": 900, "stream": _BEGINNING}
    return writer.save(step, engine.chunks, engine.optimizer, meta, state)


def optimizer_parts(engine: Any) -> list[Any]:
    """The distributed optimizers behind a chain."""
    return [
        part
        for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
        if not getattr(part, "is_stub_optimizer", False)
    ]


def fill_moments(engine: Any) -> None:
    """Numbers of their own in every element of the optimizer's state."""
    generator = torch.Generator().manual_seed(3)
    for part in optimizer_parts(engine):
        part._init_optimizer_states_with_dummy_values()
        for entry in part.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                entry[name].copy_(torch.rand(entry[name].shape, generator=generator))
            entry["step"] = torch.tensor(float(OPTIMIZER_STEP))
        for group in getattr(part, "shard_fp32_from_float16_groups", []):
            for main in group:  # the fp32 weights behind bf16 ones: close to them, not equal
                main.mul_(1 + 1e-4 * torch.rand(main.shape, generator=generator))


def flip_bit(path: Path) -> None:
    """Damage that no size tells of."""
    with open(path, "r+b") as stream:
        stream.seek(5000)
        byte = stream.read(1)
        stream.seek(5000)
        stream.write(bytes([byte[0] ^ 1]))

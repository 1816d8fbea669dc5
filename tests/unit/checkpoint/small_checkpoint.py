"""Checkpoint folders with a hundred bytes in place of tensors."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.manifest import write_manifest
from megatron_dllm.checkpoint.meta import CheckpointMeta, Position, Semantics, write_meta
from megatron_dllm.checkpoint.validation import Conditions, Validation, write_validation
from megatron_dllm.config import ModelConfig
from megatron_dllm.run.files import TEMPORARY_PREFIX, write_json
from megatron_dllm.run.names import STATE

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
    vocab_size=16,
    mask_token_id=2,
    eos_token_id=0,
    pad_token_id=1,
)

CONDITIONS = Conditions("lengths:1", 100, 64, "document", "by counts", "fp32")


def make_checkpoint(
    checkpoints: Path,
    step: int,
    elbo: float | None = None,
    is_stage_end: bool = False,
    block_size: int = 32,
    shift: bool = False,
    save_number: int | None = None,
    conditions: Conditions | None = None,
) -> Path:
    """A checkpoint as the writer leaves it, one small file for the tensors."""
    final = folders.step_folder(checkpoints, step)
    temporary = final.with_name(TEMPORARY_PREFIX + final.name)
    temporary.mkdir(parents=True)
    semantics = Semantics(
        shift=shift, block_origin="document", mask_token_id=2, block_size=block_size, context_length=64
    )
    position = Position(step=step, is_stage_end=is_stage_end, save_number=save_number)
    write_meta(temporary, CheckpointMeta(asdict(MODEL), semantics, position))
    write_json(temporary / STATE, {"step": step, "consumed_tokens": 100 * step, "text": "x" * 50})
    (temporary / "__0_0.distcp").write_bytes(bytes(range(100)))
    write_manifest(temporary, {})
    folders.publish(temporary, final)
    if elbo is not None:
        write_validation(final, Validation({"32": elbo}, {}, 32, conditions))
    return final


def steps_in(checkpoints: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in folders.list_checkpoints(checkpoints)]

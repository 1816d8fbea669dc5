"""What a checkpoint must have in common with the model and the run that take it up.

Pure standard library.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_dllm.checkpoint.meta import CheckpointMeta, RunSemantics, read_meta

# Fields of the model that decide what its tensors mean; others may change between runs.
IDENTITY = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "qk_layernorm",
    "qk_layernorm_spans_heads",
    "add_qkv_bias",
    "layernorm_epsilon",
    "rotary_base",
    "rotary_percent",
    "rotary_scaling",
    "tie_word_embeddings",
    "num_dense_layers",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_enable_expert_bias",
    "mask_token_id",
)
# What the absence of a field means that earlier versions did not have.
_ADDED_LATER = {"qk_layernorm_spans_heads": False, "add_qkv_bias": False}
# What `checkpoint.change_rotary` lets a run or a measurement change, to reach longer contexts.
ROTARY = ("rotary_base", "rotary_scaling")


def kept_fields(names: Iterable[str], change_rotary: bool) -> tuple[str, ...]:
    """Those of the model's fields that must be the checkpoint's; max_position_embeddings may change with the angles."""
    changed = (*ROTARY, "max_position_embeddings") if change_rotary else ()
    return tuple(name for name in names if name not in changed)


def check_identity(
    folder: Path, model: Any, semantics: RunSemantics | None = None, change_rotary: bool = False
) -> CheckpointMeta:
    """Refuse a checkpoint of another model or, with `semantics`, whose outputs mean something else.

    Args:
        folder: of the checkpoint.
        model: the run's ModelConfig.
        semantics: of the run; None: not compared.
        change_rotary: the model's rotary angles may be others.

    Returns:
        What contract.json says.

    Raises:
        ValueError: naming the first field that differs, both values, and the remedy.
    """
    stored = read_meta(folder)
    ours = asdict(model)
    for name in kept_fields(IDENTITY, change_rotary):
        found = stored.model.get(name, _ADDED_LATER.get(name))
        if found != ours[name]:
            remedy = "choose the model recipe it was made with"
            if name in ROTARY:
                remedy += ", or say checkpoint.change_rotary=true to stretch its context"
            raise ValueError(f"model.{name} ({ours[name]}) differs from the checkpoint {folder} ({found}); {remedy}.")
    for item in fields(RunSemantics) if semantics is not None else ():
        value, found = getattr(semantics, item.name), getattr(stored.semantics, item.name)
        if value != found:
            raise ValueError(
                f"contract: {item.name} ({value}) differs from the checkpoint {folder} "
                f"({found}); continue with the value it was trained with."
            )
    return stored


def check_start(folder: Path, config: Any) -> CheckpointMeta:
    """Refuse weights that the run's first stage would misread; returns what their contract.json says.

    Autoregressive weights may start any stage. Diffusion weights predict a token at its own slot, or with a shift at
    the one before, in blocks counted from `block_origin`: a diffusion stage of the same kind continues them.

    Raises:
        ValueError: naming the field, both values and the remedy.
    """
    stored = check_identity(folder, config.model, change_rotary=config.checkpoint.change_rotary)
    if not stored.is_diffusion:
        return stored
    name, first = next(iter(config.schedule.stages.items()))
    if first.objective == "ar":
        raise ValueError(
            f"schedule.stages.{name}.objective (ar) cannot start from the diffusion weights {folder}; "
            "start from an autoregressive checkpoint, or with a diffusion stage."
        )
    if first.is_shifted != stored.semantics.shift:
        value, found = str(first.is_shifted).lower(), str(stored.semantics.shift).lower()
        raise ValueError(
            f"schedule.stages.{name}.shift ({value}) differs from that of the diffusion weights {folder} ({found}), "
            f"which predict a token at another slot; set shift to {found} in every stage of blocks, or start from an "
            "autoregressive checkpoint."
        )
    check_grid(folder, stored, config.data.block_origin)
    return stored


def check_grid(folder: Path, stored: CheckpointMeta, block_origin: str) -> None:
    """Refuse diffusion weights of another block grid.

    Raises:
        ValueError: naming both grids.
    """
    if stored.is_diffusion and stored.semantics.block_origin != block_origin:
        raise ValueError(
            f"data.block_origin ({block_origin}) differs from that of the diffusion weights {folder} "
            f"({stored.semantics.block_origin}); continue with the grid they were trained on."
        )

"""A checkpoint's model, or this rank's part of it, with its weights.

Weights come from a torch_dist checkpoint of any layout, or straight from an HF folder, by the same table
that the conversion tools use.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_dllm.checkpoint.loading import load_weights
from megatron_dllm.checkpoint.streaming import check_finite
from megatron_dllm.config import ParallelConfig, TrainingConfig
from megatron_dllm.hf.model_folder import open_model_folder
from megatron_dllm.hf.name_table import Piece
from megatron_dllm.hf.safetensors_io import SafetensorsFolder
from megatron_dllm.inference.source import CheckpointSource
from megatron_dllm.model.gpt import DiffusionGPTModel, build_model
from megatron_dllm.model.paths import choose_paths
from megatron_dllm.parallel.device import DeviceFacts
from megatron_dllm.parallel.groups import Groups


def load_model(
    source: CheckpointSource,
    groups: Groups,
    precision: str | None,
    attention_backend: str,
    layout: ParallelConfig | None = None,
) -> DiffusionGPTModel:
    """Build the model on this process's device, load its weights, set it to evaluation.

    Args:
        source: from `read_source`.
        groups: of this rank.
        precision: of parameters and activations; None: bf16 on a GPU, fp32 without one.
        attention_backend: see `config.training.ATTENTION_BACKENDS`.
        layout: which part of the model this rank holds; None: all of it.

    Raises:
        ValueError: weights are missing, or do not fit the model.
    """
    facts = DeviceFacts.here()
    precision = precision or ("bf16" if facts.is_cuda else "fp32")
    layout = replace(layout or ParallelConfig(), precision=precision)
    paths = choose_paths(source.model, layout, facts, attention_backend)
    # Rows stay apart, each with the keys of its own slot, up to the last layer.
    training = TrainingConfig(attention_backend=attention_backend, skip_unused_outputs=False)
    model = build_model(source.model, layout, groups, paths=paths, training=training)
    if source.is_hf:
        load_hf_weights(source.folder, model)
    else:
        load_weights(source.folder, [model])
    return model.eval()


def load_hf_weights(folder: Path, model: DiffusionGPTModel) -> None:
    """Copy the tensors of an HF folder into a model of any layout; every rank reads what it holds.

    Args:
        folder: config.json and safetensors.
        model: as built, its precision stays.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or holds NaN or Inf.
    """
    source = open_model_folder(folder, model.model_config)
    targets: dict[str, list[ShardedTensor]] = defaultdict(list)
    state = model.sharded_state_dict()
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            targets[value.key].append(value)
    num_missing = sum(target.data.numel() for parts in targets.values() for target in parts)
    with torch.no_grad():
        for piece in source.names.pieces:
            num_missing -= _copy_piece(source.source, piece, targets[piece.mcore_key])
    source.source.close()
    assert num_missing == 0, f"{num_missing} elements of the model have no counterpart in the weight map"


def _copy_piece(source: SafetensorsFolder, piece: Piece, targets: list[ShardedTensor]) -> int:
    """Copy one piece into the parts of its tensor that this rank holds; returns the number of elements."""
    values = torch.empty(piece.num_elements, dtype=source.tensors[piece.hf_name].dtype)
    source.read(piece.hf_name, piece.hf_start, values)
    check_finite(values, f"{source.tensors[piece.hf_name].path}: {piece.hf_name}")
    values = values.view(piece.sizes)
    num_copied = 0
    for target in targets:
        data = target.data.view((1,) * target.prepend_axis_num + tuple(target.local_shape))
        box = [
            (max(a, b), min(a + n, b + m))
            for a, n, b, m in zip(piece.offsets, piece.sizes, target.global_offset, data.shape, strict=True)
        ]
        if all(low < high for low, high in box):
            part = values[_slices(box, piece.offsets)]
            data[_slices(box, target.global_offset)].copy_(part)
            num_copied += part.numel()
    return num_copied


def _slices(box: list[tuple[int, int]], origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(low - start, high - start) for (low, high), start in zip(box, origin, strict=True))

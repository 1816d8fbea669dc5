"""Loading through megatron-core's dist_checkpointing: weights, optimizer state, position, on any layout.

What is read: JSON, tensors (`torch.load` with weights_only), and `.metadata`, a pickle by torch's own format, which
is looked through by `check_metadata` before torch reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch import nn

from megatron_dllm.checkpoint.manifest import check_complete, damaged_files, read_manifest
from megatron_dllm.checkpoint.meta import read_state
from megatron_dllm.checkpoint.sharded_state import model_state, optimizer_state
from megatron_dllm.checkpoint.torch_dist_metadata import check_metadata
from megatron_dllm.parallel.agreement import raise_together
from megatron_dllm.parallel.optimizer_parts import optimizer_parts


def verify(folder: Path, hash_content: bool = True) -> None:
    """Compare a checkpoint with its manifest (a collective).

    Rank 0 alone looks whether every file is there and of its size, looks through the pickled metadata, and shares out
    the names; the content is compared by all ranks, each reading its share of the files.

    Args:
        folder: of the checkpoint.
        hash_content: compare the content too.

    Raises:
        ValueError: on all ranks, naming the file that is missing, truncated or altered.
    """
    shares: list[dict[str, Any]] | None = None
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            check_complete(folder)
            check_metadata(folder)
            shares = _shares(read_manifest(folder), dist.get_world_size())
        except (ValueError, OSError) as caught:
            error = ValueError(str(caught))
    raise_together(error)
    if hash_content:
        _check_content(folder, shares)


def _shares(manifest: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The entries of a manifest, dealt into as many parts as there are ranks."""
    names = sorted(manifest)
    return [{name: manifest[name] for name in names[first::number]} for first in range(number)]


def _check_content(folder: Path, shares: list[dict[str, Any]] | None) -> None:
    """Refuse a folder with an altered file (a collective).

    Args:
        folder: of the checkpoint.
        shares: what each rank is to read, on rank 0.
    """
    share: list[Any] = [None]
    dist.scatter_object_list(share, shares)
    error: Exception | None = None
    try:
        problems = damaged_files(folder, share[0], share[0])
        if problems:
            error = ValueError(f"checkpoint {folder} is damaged: {'; '.join(problems)}; choose another checkpoint.")
    except OSError as caught:
        error = ValueError(str(caught))
    raise_together(error)


def load_weights(folder: Path, chunks: Sequence[nn.Module], hash_content: bool = True) -> None:
    """Load model weights of any layout into this one; every tensor of the model must be there."""
    verify(folder, hash_content)
    loaded = dist_checkpointing.load(model_state(chunks), str(folder), strict="raise_unexpected")
    for i, chunk in enumerate(chunks):
        _load_chunk(chunk, loaded[f"chunk{i}"])


def _load_chunk(chunk: nn.Module, state: dict[str, Any]) -> None:
    missing, unexpected = unwrap_model(chunk).load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    assert not missing and not unexpected, f"missing {missing[:3]}, unexpected {unexpected[:3]}"


def load_run(folder: Path, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Load weights and optimizer state of any layout from a verified folder; returns the run's state.json."""
    state = read_state(folder)
    for part in optimizer_parts(optimizer):
        part._init_optimizer_states_with_dummy_values()
    model = model_state(chunks)
    sharded = {**model, "optimizer": optimizer_state(optimizer, model, is_loading=True)}
    loaded = dist_checkpointing.load(sharded, str(folder))
    for i, chunk in enumerate(chunks):
        _load_chunk(chunk, loaded[f"chunk{i}"])
    for i, part in enumerate(optimizer_parts(optimizer)):
        _load_optimizer_part(part, loaded["optimizer"][i], state["optimizer_step"])
    return state


def _load_optimizer_part(part: Any, param_state: dict[int, Any], optimizer_step: int) -> None:
    """Put moments and main weights into one distributed optimizer.

    torch's AdamW keeps `step` per parameter, which megatron-core neither stores nor expects in this format
    (it would fail on the key), so it is taken out for the load and put back; fused optimizers keep it in
    their param groups.
    """
    inner = part.optimizer
    steps = [(entry, entry.pop("step")) for entry in inner.state.values() if "step" in entry]
    part.load_parameter_state_from_fully_reshardable(param_state)
    for entry, step in steps:
        entry["step"] = torch.full_like(step, float(optimizer_step))
    if not steps:
        for group in inner.param_groups:
            group["step"] = optimizer_step

"""The batch of a step that was not applied, written out so that it can be looked at and run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_dllm import checkpoint_folder as folders
from megatron_dllm.data.batch import Batch


def dump_step(run_folder: Path, step: int, micro_batches: Sequence[Batch], config: dict[str, Any],
              reason: str) -> Path:
    """Write every micro-batch of this rank (ids, masks, noise levels, sample ids) and why the step was refused."""
    folder = run_folder / "replay" / f"step_{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    rank = dist.get_rank()
    tensors = {f"{index}.{item.name}": getattr(batch, item.name).cpu().contiguous()
               for index, batch in enumerate(micro_batches) for item in fields(Batch)}
    save_file(tensors, str(folder / f"rank_{rank:05d}.safetensors"))
    if rank == 0:
        folders.write_json(folder / "step.json", {"step": step, "reason": reason, "config": config})
    return folder


def load_step(folder: Path, rank: int) -> list[Batch]:
    """The micro-batches that `dump_step` wrote on a rank."""
    tensors: dict[str, torch.Tensor] = load_file(str(folder / f"rank_{rank:05d}.safetensors"))
    count = 1 + max(int(name.split(".")[0]) for name in tensors)
    return [Batch(**{item.name: tensors[f"{index}.{item.name}"] for item in fields(Batch)}) for index in range(count)]

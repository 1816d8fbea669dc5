"""A checkpoint as this project loads it, for tests that compare it with what transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dllm.checkpoint.stored_model import read_stored_model
from megatron_dllm.config import ParallelConfig


def load_ours(folder: Path) -> Any:
    """The model of a torch_dist checkpoint, on one rank."""
    from megatron_dllm.checkpoint.loading import load_weights
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import Groups

    model = build_model(read_stored_model(folder).model, ParallelConfig(), Groups.current())
    load_weights(folder, [model])
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, blocks: list[int]) -> Tensor:
    """Logits [b, s, v] of our model where every token sees its own block and earlier ones.

    Args:
        model: of `load_ours`.
        ids: [b, s] tokens.
        blocks: of the s positions.
    """
    roles = torch.zeros(*ids.shape, 3, dtype=torch.int32)
    roles[..., 1] = torch.tensor(blocks)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    states = model.states(ids, positions, roles, torch.arange(ids.numel()))
    return model.head_logits(states).view(*ids.shape, -1)

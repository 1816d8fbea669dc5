"""The norm of the mask token's embedding: whether the model has learnt what a mask is."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_dllm.training.engine import Engine
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.reports import StepReport


class MaskEmbeddingNorm(Observer):
    """L2 norm of the mask token's row of the input embedding."""

    def __init__(self, engine: Engine, mask_token_id: int, device: torch.device, is_gathered_late: bool) -> None:
        """Args: `is_gathered_late` says that a step moves this rank's share of the weights alone, as yet."""
        self._engine, self._mask_token_id, self._device = engine, mask_token_id, device
        self._is_gathered_late = is_gathered_late

    def measure(self, report: StepReport) -> dict[str, Any]:
        """The norm (a collective)."""
        square = torch.zeros(1, dtype=torch.float64, device=self._device)
        for chunk in self._engine.chunks:
            model = chunk.module.module if hasattr(chunk.module, "module") else chunk.module
            if model.pre_process:
                embedding = model.embedding.word_embeddings
                if self._is_gathered_late:
                    chunk.param_to_bucket_group[embedding.weight].start_param_sync(force_sync=True)
                local = self._mask_token_id - embedding.vocab_start_index
                is_owner = self._engine.groups.data_context.rank() == 0
                if is_owner and 0 <= local < embedding.weight.shape[0]:
                    square += embedding.weight[local].detach().double().square().sum()
        dist.all_reduce(square)
        return {"mask_embedding_norm": float(square.sqrt())}

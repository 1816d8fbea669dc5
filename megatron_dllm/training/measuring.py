"""A checkpoint's weights as a model on this rank, for commands that measure it in any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.utils import unwrap_model

from megatron_dllm.checkpoint.loading import load_weights
from megatron_dllm.evaluation.local_model import LocalModel
from megatron_dllm.evaluation.request import Request
from megatron_dllm.inference.load import load_hf_weights
from megatron_dllm.model.paths import choose_paths
from megatron_dllm.parallel.device import DeviceFacts, local_device
from megatron_dllm.parallel.groups import destroy, initialize
from megatron_dllm.parallel.meeting import Meeting
from megatron_dllm.training.engine import build_chunks


@contextmanager
def measured_model(request: Request, meeting: Meeting) -> Iterator[LocalModel]:
    """Start the ranks' groups and load the model, in evaluation mode; the groups end with the block.

    Args:
        request: what to load, and the layout.
        meeting: where the ranks have met.

    Raises:
        ValueError: an implementation that cannot run here, or weights that do not fit.
    """
    config = request.config
    # Refuses what cannot run here.
    choose_paths(config.model, config.parallel, DeviceFacts.here(), config.training.attention_backend)
    groups = initialize(config.parallel, config.run, meeting)
    try:
        chunks = build_chunks(config, groups)
        _load(request, chunks)
        yield LocalModel([chunk.eval() for chunk in chunks], config, groups, local_device())
    finally:
        destroy()


def _load(request: Request, chunks: Sequence[Any]) -> None:
    """Put the weights into the local model."""
    weights = request.weights
    if not weights.is_hf:
        load_weights(weights.folder, chunks, request.config.checkpoint.verify)
        return
    for chunk in chunks:
        load_hf_weights(weights.folder, unwrap_model(chunk))

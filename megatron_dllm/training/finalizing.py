"""The end of a backward pass: gradients are summed over the ranks and divided, and the host reads nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from megatron_dllm.parallel.groups import Groups


def gradient_finalizer(groups: Groups) -> Callable[..., None]:
    """What megatron-core's schedules are to do with the gradients of a global batch.

    As megatron-core's own, which asks for each model chunk whether there are tokens at all, and so makes the host wait
    for the backward pass before it may go on. Here the division asks: by 1 where there are none.

    Args:
        groups: of this rank.
    """

    def finalize(
        model: Sequence[Any],
        num_tokens: Tensor | None = None,
        pg_collection: Any = None,
        force_all_reduce: bool = False,
    ) -> None:
        """Sum the gradients of the chunks and divide them (a collective).

        Args:
            model: chunks of this rank.
            num_tokens: [] int32 that this rank's loss is divided by, on the last pipeline stage; it becomes the global
                batch's, on all.
            pg_collection: megatron-core's groups; None: those it was initialised with.
            force_all_reduce: sum whole gradients instead of shards.
        """
        finalize_model_grads(list(model), None, pg_collection, force_all_reduce)
        if num_tokens is None:
            return
        pipeline = groups.pipeline
        dist.broadcast(num_tokens, group=pipeline, group_src=pipeline.size() - 1)
        dist.all_reduce(num_tokens, group=groups.data_context)
        scaling = 1.0 / num_tokens.clamp(min=1)
        for chunk in model:
            chunk.scale_gradients(scaling)

    return finalize

"""The rows in which continuations are scored: their source, their geometry, and what builds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_dllm.config import TrainConfig
from megatron_dllm.config.likelihood import LikelihoodConfig
from megatron_dllm.data.costs import segment_costs
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.memory_source import MemorySource
from megatron_dllm.evaluation.continuations import NUM_SIBLING_BITS, Continuation, source_of
from megatron_dllm.evaluation.estimators import Pass
from megatron_dllm.evaluation.local_model import LocalModel
from megatron_dllm.evaluation.shared_contexts import SharedContexts


def request_rows(
    model: LocalModel,
    asked: Sequence[Continuation],
    members: Sequence[Sequence[int]],
    settings: LikelihoodConfig,
    block_size: int | None,
    one: Pass,
) -> tuple[MemorySource, RowDataset]:
    """The documents that are packed, and what builds their rows.

    Args:
        model: what scores them.
        asked: continuations that fit the window.
        members: of each document the continuations that it stands for, equally many.
        settings: of the estimate.
        block_size: of the grid; None: the model is autoregressive.
        one: views and noise of a continuation.
    """
    ids, context_length = model.config.model, model.config.schedule.context_length
    fill = "none" if block_size is None else settings.fill

    def source_for(items: Sequence[Continuation]) -> MemorySource:
        return source_of(items, block_size or 1, fill, context_length, ids.eos_token_id)

    def rows_of(source: MemorySource, num_choices: int) -> RowDataset:
        num_views = num_choices * one.num_views
        geometry = request_geometry(model.config, settings, source, block_size, num_views, model.shift)
        noise = None if one.noise is None else replace(one.noise, num_views=num_views)
        return RowDataset(
            source,
            geometry,
            noise,
            settings.seed,
            ids.mask_token_id,
            ids.pad_token_id,
            num_sibling_bits=NUM_SIBLING_BITS,
        )

    num_choices = len(members[0])
    source = source_for([asked[places[0]] for places in members])
    together = rows_of(source, num_choices)
    if num_choices == 1:
        return source, together
    choices = source_for(asked)
    alone = rows_of(choices, 1)
    longest = alone.geometry.longest_cost
    assert longest is not None, "rows of requests know their costliest one"
    alone = replace(alone, geometry=replace(alone.geometry, row_length=longest))
    return source, SharedContexts.of(together, alone, members, choices.document_lengths)


def request_geometry(
    config: TrainConfig,
    settings: LikelihoodConfig,
    source: MemorySource,
    block_size: int | None,
    num_views: int,
    shift: bool = False,
) -> RowGeometry:
    """Rows as long as the settings allow, no longer than all documents need, and never too short for one of them."""
    context_length, layout = config.schedule.context_length, config.parallel
    is_ar = block_size is None
    roomy = RowGeometry(
        objective="ar" if is_ar else "block_diffusion",
        block_size=block_size or 1,
        context_length=context_length,
        row_length=(num_views + 1) * context_length,
        num_views=0 if is_ar else num_views,
        shift=True if shift else None,
        clean_block_size=None if is_ar else config.evaluation.clean_block_size,
    )
    costs = segment_costs(roomy, source.document_lengths, source.spans)
    longest, limit = int(costs.max()), settings.row_length or 2 * context_length
    needed = max(longest, min(limit, int(costs.sum())))
    split = layout.tensor_model_parallel_size * layout.context_parallel_size
    return replace(roomy, row_length=-(-needed // split) * split, longest_cost=longest)

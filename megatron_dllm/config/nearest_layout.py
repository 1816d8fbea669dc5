"""Find a layout that works, near to one that was refused, for the error message to suggest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import product
from math import log2
from typing import Any

from megatron_dllm.config.model import ModelConfig
from megatron_dllm.config.parallel import ParallelConfig

# What an uneven pipeline costs beside halving or doubling a size, which costs 1.
_UNEVEN_COST = 1.0


def nearest_layout(
    wish: ParallelConfig, world_size: int, model: ModelConfig, check: Callable[[ParallelConfig], None]
) -> ParallelConfig | None:
    """The layout nearest to `wish` that `check` accepts, or None.

    Args:
        wish: a layout that was refused.
        world_size: ranks; every size divides them.
        model: for its layers, and whether it has experts.
        check: raises ValueError for a layout that does not work.
    """

    def by_cost(candidate: tuple[float, dict[str, Any]]) -> tuple[float, int]:
        cost, sizes = candidate
        return round(cost, 6), sum(getattr(wish, name) != size for name, size in sizes.items())

    for _, changes in sorted(_candidates(wish, world_size, model), key=by_cost):
        layout = replace(wish, **changes)
        try:
            check(layout)
        except ValueError:
            continue
        return layout
    return None


def as_overrides(wish: ParallelConfig, layout: ParallelConfig, prefix: str) -> str:
    """The settings of `layout` that differ, as overrides for the command line."""
    changes = {
        field.name: getattr(layout, field.name)
        for field in fields(layout)
        if getattr(layout, field.name) != getattr(wish, field.name)
    }
    words = {"None": "null", "True": "true", "False": "false"}
    return " ".join(f"{prefix}.{name}={words.get(str(value), value)}" for name, value in changes.items())


def _candidates(wish: ParallelConfig, world_size: int, model: ModelConfig) -> Iterator[tuple[float, dict[str, Any]]]:
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    experts = [size for size in sizes if model.is_moe and model.num_moe_experts % size == 0] or [1]
    # Skip early what `check` could never accept.
    tensor = [size for size in sizes if model.num_attention_heads % size == 0]
    pipeline = [size for size in sizes if size <= model.num_layers]
    for tp, pp, cp in product(tensor, pipeline, sizes):
        if world_size % (tp * pp * cp):
            continue
        dense_cost = sum(
            _distance(new, old)
            for new, old in (
                (tp, wish.tensor_model_parallel_size),
                (pp, wish.pipeline_model_parallel_size),
                (cp, wish.context_parallel_size),
            )
        )
        dense = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp,
            "sequence_parallel": tp > 1 and (model.is_moe or wish.sequence_parallel),
        }
        ranks_of_stage = world_size // pp
        for (stage_cost, stages), (expert_cost, expert) in product(
            _stages(wish, pp, model.num_layers),
            _experts(wish, tp, [size for size in experts if ranks_of_stage % size == 0]),
        ):
            yield dense_cost + stage_cost + expert_cost, {**dense, **stages, **expert}


def _stages(wish: ParallelConfig, pp: int, num_layers: int) -> Iterator[tuple[float, dict[str, int | None]]]:
    """Virtual stages and layers of the first and the last stage: the wish's, even ones, or nearly even ones."""
    names = (
        "virtual_pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
    )
    old = wish.virtual_pipeline_model_parallel_size
    even = [number for number in range(2, num_layers + 1) if num_layers % (pp * number) == 0] if old and pp > 1 else []
    for virtual in dict.fromkeys((None, old, *even)):
        step = virtual or 1
        middle = max(round(num_layers / pp / step), 1) * step
        rest = num_layers - (pp - 2) * middle
        first = rest // 2 // step * step
        for cost, ends in (
            (0.0, (wish.num_layers_in_first_pipeline_stage, wish.num_layers_in_last_pipeline_stage)),
            (0.0, (None, None)),
            (_UNEVEN_COST, (first, None if pp == 2 else rest - first)),
        ):
            yield cost + _distance(virtual or 1, old or 1), dict(zip(names, (virtual, *ends), strict=True))


def _experts(wish: ParallelConfig, tp: int, sizes: list[int]) -> Iterator[tuple[float, dict[str, int | None]]]:
    old = wish.expert_tensor_parallel_size
    for ep, etp in product(sizes, dict.fromkeys((old, None, 1))):
        moved = 0.0 if etp == old else _distance(etp or tp, old or wish.tensor_model_parallel_size)
        yield (
            _distance(ep, wish.expert_model_parallel_size) + moved,
            {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp},
        )


def _distance(new: int, old: int) -> float:
    return abs(log2(new / max(old, 1)))

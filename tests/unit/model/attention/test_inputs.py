"""What depends on the roles, and the rotary angles, is made once per micro-batch, for all layers and passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from megatron_dllm.config import ParallelConfig, TrainingConfig
from megatron_dllm.model.attention import dense
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch

ROWS = [[17, 9], [24]]


class _Counting:
    """The reference backend, which counts its calls."""

    IS_COMPILED_PER_SHAPE = False

    def __init__(self) -> None:
        self.num_plans = self.num_passes = 0

    def build_plan(self, query_roles: Tensor, key_roles: Tensor) -> Any:
        self.num_plans += 1
        return dense.build_plan(query_roles, key_roles)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, plan: Any, scale: float) -> Tensor:
        self.num_passes += 1
        return dense.attend(query, key, value, plan, scale)


@pytest.mark.parametrize("skips_outputs", [False, True])
@pytest.mark.parametrize(("recompute", "passes_per_layer"), [("none", 1), ("selective", 2), ("full", 2)])
def test_plans_are_made_once_per_micro_batch(
    one_rank: Any, recompute: str, passes_per_layer: int, skips_outputs: bool
) -> None:
    """One plan for all queries, and one for the last layer where it keeps only some."""
    from megatron_dllm.model.gpt import build_model

    model, training = tiny_model(), TrainingConfig(skip_unused_outputs=skips_outputs)
    built = build_model(model, ParallelConfig(recompute=recompute), one_rank, training=training).train()
    backend = _Counting()
    built.attention = replace(built.attention, backend=backend)
    angles: set[int] = set()
    for layer in built.decoder.layers:
        layer.register_forward_pre_hook(
            lambda _, __, kwargs: angles.add(kwargs["rotary_pos_emb"].data_ptr()), with_kwargs=True
        )
    for index in (1, 2):
        batch = tiny_batch(model, ROWS, row_length=56, block_size=4, seed=index)
        angles.clear()
        built(batch).nll.sum().backward()
        assert backend.num_plans == index * (2 if skips_outputs else 1)
        assert len(angles) == 1, "all layers, recomputed or not, turn by the same angles"
        assert backend.num_passes == index * model.num_layers * passes_per_layer


def test_a_stage_of_one_skipping_layer_plans_for_the_kept_queries_alone(one_rank: Any) -> None:
    from megatron_dllm.model.gpt import build_model

    model = tiny_model(num_layers=1, num_dense_layers=0)
    built = build_model(model, ParallelConfig(), one_rank)
    backend = _Counting()
    built.attention = replace(built.attention, backend=backend)
    built(tiny_batch(model, ROWS, row_length=56, block_size=4))
    assert (backend.num_plans, backend.num_passes) == (1, 1)

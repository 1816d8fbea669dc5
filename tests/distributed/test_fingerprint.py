"""Ranks that train on different data notice it; context-parallel ranks report how even their work is."""

from __future__ import annotations

import torch

from benchmarks.ranks import run_ranks
from megatron_dllm.config import ParallelConfig, RunConfig
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch


def _fingerprints(seeds: list[int]) -> tuple[str, str]:
    """This rank's fingerprint and what the comparison over ranks says; each rank's masks come from its seed."""
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.observers.fingerprint import check_agreement, step_fingerprint

    made = groups.initialize(ParallelConfig(context_parallel_size=2), RunConfig(name="test"))
    batch = tiny_batch(tiny_model(), [[12, 9]], 48, block_size=4, seed=seeds[torch.distributed.get_rank()])
    fingerprint = step_fingerprint([batch], made.data)
    try:
        check_agreement(fingerprint)
    except RuntimeError as error:
        return fingerprint, str(error)
    return fingerprint, ""


def _global_fingerprint() -> str:
    """Of the same four rows, shared out over the ranks."""
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.observers.fingerprint import step_fingerprint

    made = groups.initialize(ParallelConfig(), RunConfig(name="test"))
    rows = [
        tiny_batch(tiny_model(), [lengths], 48, block_size=4, seed=index)
        for index, lengths in enumerate([[12, 9], [20], [3, 4, 5], [8]])
    ]
    return step_fingerprint(rows[torch.distributed.get_rank() :: torch.distributed.get_world_size()], made.data)


def _balance(method: str) -> dict[str, float]:
    from megatron_dllm.parallel import groups
    from megatron_dllm.training.observers.context_balance import context_balance

    layout = ParallelConfig(context_parallel_size=2, context_parallel_method=method)
    made = groups.initialize(layout, RunConfig(name="test"))
    batch = tiny_batch(tiny_model(), [[40, 20], [57]], row_length=128, block_size=4)
    return context_balance([batch], layout, made.data, torch.device("cpu"))


def test_equal_data_agrees_and_other_data_is_named() -> None:
    results = run_ranks(_fingerprints, 2, [3, 3])
    assert results[0] == results[1] and results[0][1] == ""
    for _, message in run_ranks(_fingerprints, 2, [3, 4]):
        assert message.startswith("ranks [1] train on other samples")


def test_balance_is_reported_alike_on_every_rank() -> None:
    first, second = run_ranks(_balance, 2, "gather")
    assert first == second
    assert 1.0 <= first["context_pairs/mean"] <= first["context_pairs/max"] <= 1.05
    assert run_ranks(_balance, 2, "ulysses") == [{}, {}], "even by construction: the deal's ratio would say nothing"


def test_rows_count_in_their_global_order() -> None:
    (expected,) = run_ranks(_global_fingerprint, 1)
    assert run_ranks(_global_fingerprint, 2) == [expected, expected]

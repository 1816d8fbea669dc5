"""Tensors without values: what stays known, and what is assumed of the rest."""

from __future__ import annotations

import torch

from megatron_dllm.planning.engine_ledger import Ledger
from megatron_dllm.planning.engine_memory import LiveMemory
from megatron_dllm.planning.engine_values import DeviceNames, KnownValues


def test_counts_stay_known_and_numbers_that_compute_do_not() -> None:
    with KnownValues(Ledger({}), 0.5):
        places = torch.arange(6)[torch.tensor([4, 1])] + 1
        activations = torch.ones(2, 3).index_select(0, places.clamp(max=1))
    assert places.tolist() == [5, 2]
    assert activations.is_meta and activations.shape == (2, 3)


def test_experts_get_equal_counts_that_add_up_to_what_is_selected() -> None:
    with KnownValues(Ledger({}), 3 / 8):
        routing_map = torch.empty(5, 8) > 0
        counts = routing_map.sum(dim=0)
        selected = torch.empty(5, 8).masked_select(routing_map)
    assert counts.tolist() == [1, 2, 2, 2, 2, 2, 2, 2]
    assert len(selected) == int(counts.sum()) == 15


def test_what_the_host_asks_of_unknown_numbers_is_one() -> None:
    with DeviceNames(False, LiveMemory()), KnownValues(Ledger({}), 1.0):
        losses = torch.tensor([torch.ones(()), torch.ones(())])
        assert losses.shape == (2,)
        assert float(losses.sum()) == 1.0 and bool((losses > 5).all())


def test_a_fused_function_allocates_what_it_returns() -> None:
    from megatron_dllm.model.fused import fused

    @fused
    def total(rows: torch.Tensor) -> torch.Tensor:
        return rows.expand(1000, -1).exp().sum(0)

    peaks = {}
    for is_cuda in (False, True):
        memory = LiveMemory()
        with DeviceNames(is_cuda, memory), KnownValues(Ledger({}), 1.0), memory:
            rows = torch.ones(10)
            total(rows)
        peaks[is_cuda] = memory.peak
    assert peaks == {True: 80, False: 40_080}


def test_products_are_counted() -> None:
    ledger = Ledger({})
    with KnownValues(ledger, 1.0):
        torch.ones(5, 7) @ torch.ones(7, 3)
        torch.nn.functional.grouped_mm(torch.ones(6, 4), torch.ones(2, 4, 8), offs=torch.tensor([2, 6]).int())
    assert ledger.flops == 2 * 5 * 7 * 3 + 2 * 6 * 4 * 8

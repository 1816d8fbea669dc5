"""What is alive: storages counted once, from the operation that makes them to their end."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_dllm.planning.engine_memory import LiveMemory


def test_a_storage_counts_once_and_until_its_last_view_ends() -> None:
    memory = LiveMemory()
    with memory:
        whole = torch.zeros(100)
        view = whole[:10].view(2, 5)
        assert memory.live == 400
        del whole
        assert memory.live == 400
        del view
        assert memory.live == 0
    assert memory.peak == 400


def test_a_peak_counts_from_when_it_is_asked_for() -> None:
    memory = LiveMemory()
    with memory:
        kept = torch.zeros(10)
        torch.zeros(1000)
        memory.start_peak()
        torch.zeros(100)
    assert memory.peak == kept.nbytes + 400


def _allocated(events: Any) -> int:
    """The largest sum of the allocator's events."""
    live = peak = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_the_peak_of_a_backward_pass_is_the_allocators() -> None:
    memory = LiveMemory()
    with memory:
        model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
        before = memory.live

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(torch.ones(512, 64)).tanh().sum().backward()

    with memory:
        step()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    expected = _allocated(found.profiler.kineto_results.events())
    assert abs(memory.peak - before - expected) <= 0.01 * expected

"""The parts of a step from a clock that a test turns on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dllm.training.observers.step_timing import StepWatch, rank_parts

# What megatron-core says in a step of two micro-batches, and how long each part takes; parts apart take no time.
STEP = [
    ("forward-compute", 3.0),
    ("forward-send", 0.5),
    ("forward-compute", 3.0),
    ("backward-recv", 1.5),
    ("backward-compute", 6.0),
    ("backward-compute", 6.0),
    ("all-grads-sync", 2.0),
    ("non-tensor-parallel-grads-all-reduce", 0.25),
]
UPDATE = [("optimizer-inner-step", 4.0), ("params-all-gather", 1.0)]


class Clock:
    """Shows the time that it was last turned on to."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def run(self, watch: StepWatch, parts: list[tuple[str, float]]) -> None:
        for name, seconds in parts:
            watch(name, log_level=2).start(barrier=True)
            self.time += seconds
            watch(name).stop()


def test_parts_of_a_step_by_hand() -> None:
    clock = Clock()
    watch = StepWatch(clock.now, lambda start, end: end - start)
    watch("forward-backward", log_level=1).start()
    clock.run(watch, STEP)
    watch("forward-backward").stop()
    clock.run(watch, UPDATE)
    micro_batch, waiting, gradients, update, memory = rank_parts(watch, 2)
    assert (micro_batch, waiting, gradients, update) == (9.0, 2.0, 2.25, 5.0)
    assert memory > 0.01


@pytest.mark.usefixtures("one_rank")
def test_all_that_megatron_says_behind_a_backward_pass_is_of_gradients(tmp_path: Path) -> None:
    from benchmarks.tiny_run import run_config, write_corpus
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.finalizing import gradient_finalizer
    from megatron_dllm.training.observers.step_timing import StepTiming

    write_corpus(tmp_path / "corpus")
    engine = build_engine(run_config(tmp_path, "engine"), Groups.current())
    moments = count()
    watch = StepWatch(lambda: next(moments), lambda start, end: float(end - start))
    with StepTiming(engine, torch.device("cpu")).watching(watch):
        gradient_finalizer(Groups.current())(engine.chunks, torch.tensor(1, dtype=torch.int))
    expected_parts = next(moments) / 2  # each from one moment to the next
    _, _, gradients, _, _ = rank_parts(watch, 1)
    assert gradients == expected_parts > 1


class Event:
    """A CUDA event: its moment is that of the stream, and known only behind a wait."""

    def __init__(self, moments: Iterator[int], enable_timing: bool) -> None:
        assert enable_timing
        self._moments, self._moment, self._is_known = moments, -1, False

    def record(self) -> None:
        self._moment = next(self._moments)

    def synchronize(self) -> None:
        self._is_known = True

    def elapsed_time(self, end: Event) -> float:
        assert end._is_known
        return 1000.0 * (end._moment - self._moment)


def test_a_gpu_is_asked_after_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = count()
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: Event(moments, **options))
    watch = StepWatch.of_device(torch.device("cuda"))
    for _ in range(3):
        watch("forward-compute").start()
        watch("forward-compute").stop()
    made: Any = next(moments)
    assert made == 6, "an event at each beginning and end, and nothing has waited"
    assert watch.seconds("forward-compute") == 3.0

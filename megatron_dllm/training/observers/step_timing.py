"""Where the time of a logged step goes on each pipeline rank, and its memory: what `plan calibrate=[RUN]` is fitted to.

megatron-core says where the parts of a step begin and end to whatever `timers` of its configurations is. Here that is
a watch, and only while a step that is logged runs. It reads the host's clock on a CPU; on a GPU it puts events into the
stream, which nobody waits for: they are read when the step's other numbers have come.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_dllm.parallel.optimizer_parts import optimizer_parts
from megatron_dllm.training.engine import Engine
from megatron_dllm.training.observers.metrics import peak_memory_gib
from megatron_dllm.training.observers.metrics_file import PARTS_OF_RANKS
from megatron_dllm.training.observers.observer import Observer, Watch
from megatron_dllm.training.reports import StepReport

# What megatron-core calls the sums of gradients: of replicas, and of weights that several ranks hold.
_GRADIENTS = ("all-grads-sync", "non-tensor-parallel-grads", "embedding-grads", "conditional-embedder-grads")
# A moment: seconds of the host's clock, or an event in the stream of a GPU.
Moment = Any


@dataclass(frozen=True)
class Part:
    """One part of a step under megatron-core's name; it may come many times.

    Attributes:
        now: gives the present moment.
        moments: beginning and end of each time, one after the other.
    """

    now: Callable[[], Moment]
    moments: list[Moment] = field(default_factory=list)

    def start(self, barrier: bool = False) -> None:
        """It begins; ranks do not wait for each other, whatever megatron-core wants."""
        self.moments.append(self.now())

    def stop(self, barrier: bool = False) -> None:
        """It ends."""
        self.moments.append(self.now())


class StepWatch:
    """What megatron-core calls as `timers(name, log_level).start()` and `.stop()`."""

    def __init__(self, now: Callable[[], Moment], between: Callable[[Moment, Moment], float]) -> None:
        """Args: what gives the present moment, and the seconds from one to another."""
        self._between = between
        self._parts: dict[str, Part] = defaultdict(lambda: Part(now))

    @classmethod
    def of_device(cls, device: torch.device) -> StepWatch:
        """For steps on this device."""
        if device.type != "cuda":
            return cls(time.perf_counter, lambda start, end: float(end - start))
        return cls(_event, _device_seconds)

    def __call__(self, name: str, log_level: int = 0) -> Part:
        """A part of the step."""
        return self._parts[name]

    def seconds(self, *names: str) -> float:
        """All times of the parts whose names begin so, together."""
        found = [part.moments for name, part in self._parts.items() if name.startswith(names)]
        return sum(self._between(*pair) for moments in found for pair in zip(moments[::2], moments[1::2], strict=True))


def _event() -> torch.cuda.Event:
    make: Any = torch.cuda.Event  # torch says nothing of its types
    event: torch.cuda.Event = make(enable_timing=True)
    event.record()
    return event


def _device_seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    # The step's other numbers have been read from the device by now, so this does not wait.
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def rank_parts(watch: StepWatch, num_micro_batches: int) -> list[float]:
    """Of this rank, in the order of PARTS_OF_RANKS: seconds of a micro-batch, of waiting, gradients and update; GiB.

    Waiting is what of the schedule is neither a micro-batch nor the gradients: sends, receives, and the pipeline's
    bubble.
    """
    computing = watch.seconds("forward-compute", "backward-compute")
    gradients = watch.seconds(*_GRADIENTS)
    waiting = max(watch.seconds("forward-backward") - computing - gradients, 0.0)
    update = watch.seconds("optimizer-", "params-all-gather")
    return [computing / num_micro_batches, waiting, gradients, update, peak_memory_gib()]


class StepTiming(Observer):
    """Records the parts of a step of every pipeline rank: of the ranks that hold the same layers, the slowest."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        """Args: what is watched, and where it computes."""
        self._groups, self._device = engine.groups, device
        optimizers = optimizer_parts(engine.optimizer)
        self._told: list[Any] = [engine.transformer_config, *(part.config for part in optimizers)]
        self._watch: StepWatch | None = None

    def around_step(self, is_logged: bool) -> AbstractContextManager[Watch | None]:
        """Watch a step that is logged."""
        return self.watching(StepWatch.of_device(self._device)) if is_logged else nullcontext()

    @contextmanager
    def watching(self, watch: StepWatch) -> Iterator[None]:
        """Have megatron-core tell a watch, while the block runs, of the parts of a step."""
        self._watch = watch
        for config in self._told:
            config.timers = self._watch
        try:
            yield
        finally:
            for config in self._told:
                config.timers = None

    def measure(self, report: StepReport) -> dict[str, Any]:
        """Each part of every pipeline rank (a collective)."""
        assert self._watch is not None, "a step that is logged was watched"
        pipeline = self._groups.pipeline
        parts = torch.zeros(pipeline.size(), len(PARTS_OF_RANKS), dtype=torch.float64)
        parts[pipeline.rank()] = torch.tensor(rank_parts(self._watch, len(report.micro_batches)))
        shared = parts.to(self._device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return {
            f"{name}/{rank}": value
            for rank, values in enumerate(shared.tolist())
            for name, value in zip(PARTS_OF_RANKS, values, strict=True)
        }

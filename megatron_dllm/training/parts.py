"""What a run is put together from: a later method or a test hands in other parts, and the loop stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dllm.config import NoiseConfig, StageConfig, TrainConfig
from megatron_dllm.data.source import Source
from megatron_dllm.model.objective import Objective, objective_of
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.training.engine import Engine, build_engine
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.observers.standard import Setting, standard_observers
from megatron_dllm.training.sources import open_corpus
from megatron_dllm.training.spikes import SpikeRule


def spike_rule(config: TrainConfig) -> SpikeRule:
    """The rule with the run's own factor."""
    return SpikeRule(config.optimizer.spike_factor)


def no_wait() -> None:
    """Publish a checkpoint at once."""


@dataclass(frozen=True)
class Parts:
    """The replaceable parts of a run.

    Attributes:
        objective_of: what a stage trains for.
        open_source: the documents behind `data.train` and `data.validation`.
        build_engine: model and optimizer of this rank.
        make_observers: the observers of a run, once its engine stands.
        extra_observers: told after those.
        spike_rule: which gradient norms are withheld.
        before_publish: called on rank 0 when all files of a checkpoint are written, before it is renamed into place.
    """

    objective_of: Callable[[StageConfig, NoiseConfig], Objective] = objective_of
    open_source: Callable[[str, TrainConfig], Source] = open_corpus
    build_engine: Callable[[TrainConfig, Groups], Engine] = build_engine
    make_observers: Callable[[Setting], Sequence[Observer]] = standard_observers
    extra_observers: Sequence[Observer] = ()
    spike_rule: Callable[[TrainConfig], SpikeRule] = spike_rule
    before_publish: Callable[[], None] = no_wait

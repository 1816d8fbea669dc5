"""Fit the planner's three constants of time to steps that were measured, and say how wrong the prediction was.

A constant that the measurements say nothing about (links on one GPU, say) stays where it was: every departure from the
assumed value costs a little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.planning.layout_plan import Candidate, Setting, micro_batches_of, plan_stage
from megatron_dllm.planning.links import Links
from megatron_dllm.planning.timing import Machine
from megatron_dllm.planning.work import StageWork

# What is fitted, and the largest sensible value.
CONSTANTS = {"product_efficiency": 1.0, "host_ms_per_layer": 1e4, "link_efficiency": 1.0}
# A departure by a factor e from the assumed value counts as much as an error of this square in one measurement.
_WEIGHT = 0.01
# Steps of the search for the best values, as factors in logarithms, and rounds with each of them.
_STEPS = tuple(0.7 / 2**power for power in range(10))
_ROUNDS = 6
# With fewer measurements none is left out to judge the others.
LEAST_TO_LEAVE_OUT = 4


@dataclass(frozen=True)
class Observation:
    """A step that was measured.

    Attributes:
        name: of the run and the stage.
        setting: of the run; its assumptions do not count.
        work: the stage.
        candidate: its layout.
        seconds: of a step.
        micro_batches: seconds of a micro-batch on each pipeline rank; empty where they were not measured, or where a
            step has other passes beside them.
        peak: bytes of the fullest rank; None where they were not measured.
    """

    name: str
    setting: Setting
    work: StageWork
    candidate: Candidate
    seconds: float
    micro_batches: tuple[float, ...] = ()
    peak: int | None = None

    def predicted(self, assumptions: AssumptionsConfig) -> float:
        """Seconds of a step under assumptions."""
        return plan_stage(self._under(assumptions), self.work, self.candidate).time.total

    def predicted_peak(self) -> int:
        """Bytes of the fullest rank by formula, with what is reserved beside the tensors."""
        return plan_stage(self.setting, self.work, self.candidate).worst.total

    def error(self, assumptions: AssumptionsConfig) -> float:
        """Logarithm of predicted by measured: 0 is right, positive too slow."""
        return math.log(self.predicted(assumptions) / self.seconds)

    def square(self, assumptions: AssumptionsConfig) -> float:
        """What the observation says against constants: the square of its error, and that of its micro-batches."""
        square = self.error(assumptions) ** 2
        if self.micro_batches:
            times = micro_batches_of(self._under(assumptions), self.work, self.candidate)
            pairs = zip(times, self.micro_batches, strict=True)
            square += sum(math.log(time / seconds) ** 2 for time, seconds in pairs) / len(times)
        return square

    def _under(self, assumptions: AssumptionsConfig) -> Setting:
        machine = self.setting.machine
        share = assumptions.link_efficiency / machine.assumptions.link_efficiency
        links = Links(machine.links.node * share, machine.links.network * share, machine.links.gpus_per_node)
        return replace(self.setting, machine=Machine(machine.hardware, links, assumptions))


@dataclass(frozen=True)
class Judged:
    """An observation beside its predictions: ratios of predicted by measured.

    Attributes:
        name: of the run and the stage.
        seconds: measured.
        before: with the constants as they were.
        fitted: with those fitted to all observations.
        left_out: with those fitted to the others; None where there are too few.
        peak: bytes of the fullest rank, measured and by formula; None where they were not measured.
    """

    name: str
    seconds: float
    before: float
    fitted: float
    left_out: float | None
    peak: tuple[int, int] | None = None


@dataclass(frozen=True)
class Calibration:
    """Fitted constants, and how well they do."""

    assumptions: AssumptionsConfig
    judged: tuple[Judged, ...]


def machine_of(cluster: ClusterConfig, assumptions: AssumptionsConfig) -> Machine:
    """What executes a plan: a cluster's hardware under assumptions."""
    return Machine(cluster.hardware, Links.of(cluster, assumptions), assumptions)


def fit(observations: Sequence[Observation], assumed: AssumptionsConfig) -> AssumptionsConfig:
    """The constants that predict the observations best.

    Args:
        observations: at least one.
        assumed: where the search begins.
    """

    def cost(found: AssumptionsConfig) -> float:
        errors = sum(observation.square(found) for observation in observations)
        moved = sum(math.log(getattr(found, name) / getattr(assumed, name)) ** 2 for name in CONSTANTS)
        return errors + _WEIGHT * moved

    best, least = assumed, cost(assumed)
    for step in _STEPS:
        for _ in range(_ROUNDS):
            start = least
            for name, largest in CONSTANTS.items():
                for factor in (math.exp(step), math.exp(-step)):
                    value = min(getattr(best, name) * factor, largest)
                    found = replace(best, **{name: value})
                    if (there := cost(found)) < least:
                        best, least = found, there
            if least == start:
                break
    return best


def calibrate(observations: Sequence[Observation], assumed: AssumptionsConfig, name: str) -> Calibration:
    """Fit, and judge every observation by a fit to the others.

    Args:
        observations: at least one.
        assumed: constants before.
        name: what the constants are then said to be calibrated on.
    """
    fitted = fit(observations, assumed)
    judged = []
    for number, observation in enumerate(observations):
        others = [*observations[:number], *observations[number + 1 :]]
        left_out = None
        if len(observations) >= LEAST_TO_LEAVE_OUT:
            left_out = math.exp(observation.error(fit(others, assumed)))
        ratios = [math.exp(observation.error(constants)) for constants in (assumed, fitted)]
        peak = None if observation.peak is None else (observation.peak, observation.predicted_peak())
        judged.append(Judged(observation.name, observation.seconds, ratios[0], ratios[1], left_out, peak))
    low, high = _interval(judged, assumed)
    return Calibration(replace(fitted, calibrated_on=name, interval_low=low, interval_high=high), tuple(judged))


def _interval(judged: Sequence[Judged], assumed: AssumptionsConfig) -> tuple[float, float]:
    """Measured by predicted, from the least to the largest of those that were left out."""
    ratios = [1.0 / found.left_out for found in judged if found.left_out is not None]
    if not ratios:
        return assumed.interval_low, assumed.interval_high
    return min(*ratios, 1.0), max(*ratios, 1.0)


def override_words(found: AssumptionsConfig) -> str:
    """The words that make a plan use the constants."""
    names = (*CONSTANTS, "interval_low", "interval_high", "calibrated_on")
    values = {name: getattr(found, name) for name in names}
    return " ".join(
        f"assumptions.{name}={f'{value:.4g}' if isinstance(value, float) else value}" for name, value in values.items()
    )

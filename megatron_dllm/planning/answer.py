"""What the planner says of a stage, whoever found it: the engine itself, or the closed form.

All sizes are bytes, all counts those of one optimizer step. Ranks that do the same work hold the same, so an answer
has one of each kind: the first, a middle and the last pipeline stage.
"""

from __future__ import annotations

from dataclasses import dataclass

# Where an answer comes from.
ENGINE, FORMULA = "engine", "formula"


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the moment of a step at which it holds the most.

    Attributes:
        rank: which one.
        weights: parameters in the training precision.
        gradients: of these parameters, in the precision in which they are summed.
        optimizer: this rank's shard of the fp32 weights and of Adam's two moments.
        activations: whatever else is alive, the head's part excepted.
        head: what the backward pass of the LM head has allocated, where that is the moment; else 0.
        reserve: what the device and its libraries take beside the tensors; the engine does not know it and says 0.
    """

    rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    reserve: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.reserve


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in one kind of collective over one group, in one step.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter, all_to_all, send, broadcast.
        group: whose ranks take part: tp, pp, cp, ep, etp (tensor ranks of the experts), tp_ep (those and ep),
            dp (replicas of the dense weights, context ranks included), edp (replicas of the experts), world.
        ranks: of the group; they say whether it lies within a node.
        calls: number of collectives.
        num_bytes: in the larger of a call's input and output, over all calls. Of a ring of n ranks (n - 1)/n of it
            travels, twice in an all_reduce.
    """

    kind: str
    group: str
    ranks: tuple[int, ...]
    calls: int
    num_bytes: int


@dataclass(frozen=True)
class RankAnswer:
    """What one rank holds and does.

    Attributes:
        memory: at its peak.
        num_parameters: elements of the weights that it holds.
        flops: floating point operations of its matrix products and attention in one step, recomputation included.
        traffic: of one step.
    """

    memory: RankMemory
    num_parameters: int
    flops: int
    traffic: tuple[Traffic, ...]


@dataclass(frozen=True)
class StageAnswer:
    """What a stage of the schedule needs.

    Attributes:
        stage: its name in the schedule.
        ranks: one of each kind.
        source: ENGINE or FORMULA.
    """

    stage: str
    ranks: tuple[RankAnswer, ...]
    source: str

    @property
    def worst(self) -> RankAnswer:
        """The rank that needs the most memory."""
        return max(self.ranks, key=lambda rank: rank.memory.total)

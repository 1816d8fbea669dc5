"""What is planned: a training run, the nodes it is to run on, and what a better layout should be better in."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.config.rules import check, check_choice, check_positive
from megatron_dllm.config.train import TrainConfig

PLAN_OBJECTIVES = ("time", "cost", "gpus")
# A search looks at every layout of every number of GPUs.
MOST_GPUS = 65536


@dataclass
class PlanKeys:
    """What a plan asks beside the keys of training and of the cluster."""

    # Nodes that the run is to have.
    nodes: int = 1
    # Look for the best layout, recomputation and micro-batch among all that can be run.
    search: bool = False
    # The search may take any number of nodes up to so many GPUs; null: those of `nodes`.
    max_gpus: int | None = None
    # What the search makes small: time (of the run), cost (GPU-hours) or gpus (then time).
    objective: str = "time"
    # Ask the engine itself for the ranks that decide (some seconds to minutes each): of the best layout of a search,
    # else of the recipe's.
    confirm: bool = False
    # Constants of the prediction.
    assumptions: AssumptionsConfig = field(default_factory=AssumptionsConfig)
    # Folders of runs whose metrics the constants are fitted to, instead of a plan; null: a plan.
    calibrate: list[str] | None = None
    # Folder for plan.json and the picture, which must not exist yet; null: only the screen.
    output: str | None = None


@dataclass
class PlanConfig(PlanKeys, TrainConfig):
    """A training run, of which nothing is started, and where it is to run."""

    # Nodes, GPUs and links; one of the recipes of the group cluster.
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def validate_plan(self) -> None:
        """Check what is no part of a training run.

        Raises:
            ValueError: naming the field, its value, the rule and the remedy.
        """
        self.cluster.validate()
        self.cluster.hardware.check_known()
        self.assumptions.validate()
        check_choice("objective", self.objective, PLAN_OBJECTIVES)
        check_positive("nodes", self.nodes)
        check(
            self.num_gpus <= MOST_GPUS,
            f"nodes ({self.nodes}) must have at most {MOST_GPUS} GPUs together, of {self.cluster.num_ranks_per_node} "
            "a node; give fewer nodes.",
        )
        for name, stage in self.schedule.stages.items():
            check(
                not self.search or (stage.parallel is None and stage.world_size is None),
                f"search (true) looks for one layout of the whole run, and schedule.stages.{name} has its own parallel "
                "or world_size; set those to null, or plan without search.",
            )
        if self.max_gpus is not None:
            check(
                self.cluster.num_ranks_per_node <= self.max_gpus <= MOST_GPUS,
                f"max_gpus ({self.max_gpus}) must lie between a node's {self.cluster.num_ranks_per_node} and "
                f"{MOST_GPUS}; it is a number of GPUs.",
            )
            check(self.search, f"max_gpus ({self.max_gpus}) has an effect only with search=true; add it.")

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.cluster.num_ranks_per_node

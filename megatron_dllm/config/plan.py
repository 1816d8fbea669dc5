"""What is planned: a training run, the nodes it is to run on, and what a better layout should be better in."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.config.rules import check, check_choice, check_positive
from megatron_dllm.config.train import TrainConfig

PLAN_OBJECTIVES = ("time", "cost", "gpus")
TASKS = ("train", "evaluate", "generate")
# A search looks at every layout of every number of GPUs.
MOST_GPUS = 65536


@dataclass
class TextsConfig:
    """The texts that are decoded. Lengths count tokens."""

    # Texts that are decoded at a time, on each replica of the model; null: as many as fit.
    batch_size: int | None = None
    # Of a prompt.
    prompt_length: int = 1024
    # That follow it.
    max_new_tokens: int = 1024
    # Tokens denoised together.
    block_size: int = 32
    # Tokens that a pass accepts in a text's block, on average: what `generate` shows as TPF. It depends on the model,
    # the text and the threshold.
    tokens_per_pass: float = 2.0

    @property
    def length(self) -> int:
        """Of prompt and new tokens together, to the end of the last block."""
        tokens = self.prompt_length + self.max_new_tokens
        return tokens + -tokens % self.block_size

    def validate(self, context_length: int) -> None:
        """Raise ValueError for texts that no model can hold.

        Args:
            context_length: most tokens of a text.
        """
        for name in ("prompt_length", "max_new_tokens", "block_size"):
            check_positive(f"texts.{name}", getattr(self, name))
        check(
            self.batch_size is None or self.batch_size > 0,
            f"texts.batch_size ({self.batch_size}) must be positive; null takes as many texts as fit.",
        )
        check(
            1.0 <= self.tokens_per_pass <= self.block_size,
            f"texts.tokens_per_pass ({self.tokens_per_pass}) must lie between 1 and texts.block_size "
            f"({self.block_size}): a pass accepts at least one token, and at most a block.",
        )
        check(
            self.prompt_length + self.max_new_tokens <= context_length,
            f"texts.prompt_length + max_new_tokens ({self.prompt_length} + {self.max_new_tokens}) must not exceed "
            f"model.max_position_embeddings ({context_length}); make them shorter.",
        )


@dataclass
class PlanKeys:
    """What a plan asks beside the keys of training and of the cluster."""

    # What is to run: train, evaluate (the ELBO of evaluation.num_tokens) or generate (decode `texts`).
    task: str = "train"
    # Of task generate.
    texts: TextsConfig = field(default_factory=TextsConfig)
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
        check_choice("task", self.task, TASKS)
        check(
            self.task == "train" or not (self.search or self.confirm),
            f"task ({self.task}) has no search and no confirm, which are for training; leave them out.",
        )
        if self.task == "generate":
            self.texts.validate(self.model.max_position_embeddings)
        layouts = [self.layout_of(stage) for stage in self.schedule.stages.values()]
        check(
            not self.confirm or all(layout.precision != "fp8" for layout in layouts),
            "confirm (true) asks the engine, which computes in FP8 with TransformerEngine on a GPU alone; confirm with "
            "parallel.precision=bf16, or leave confirm out.",
        )
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

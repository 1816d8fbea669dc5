"""What is to be run: the schema of a chain, and its jobs resolved to commands (launch/chain.py resolves them).

A chain is a list of jobs, run one after the other: a job is a training run (`experiment`) or a tool (`module` with
`arguments`). A plain experiment is a chain of one job.

    recipes/chain/NAME.yaml        jobs in order; `${root}/${name}` is the chain's folder
    recipes/experiment/NAME.yaml   one training run
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from megatron_dllm.config import TrainConfig
from megatron_dllm.config.cluster import ClusterConfig, time_limit_seconds
from megatron_dllm.config.recipe_source import RECIPES
from megatron_dllm.config.rules import check, check_name


@dataclass
class JobSpec:
    """One job of a chain as a recipe gives it: `experiment` or `module`, never both."""

    # A training run: recipes/experiment/NAME.yaml and what differs from it.
    experiment: str | None = None
    overrides: list[str] = field(default_factory=list)
    # A tool: python -m MODULE ARGUMENTS.
    module: str | None = None
    arguments: list[str] = field(default_factory=list)
    # What the tool writes. An output that exists after the tool was started is complete: tools rename at the end.
    output: str | None = None
    # Jobs that must be finished before; null: the one listed before this one.
    after: list[str] | None = None
    nodes: int = 1
    # A restart may run on fewer nodes, down to this many; null: always on `nodes`.
    min_nodes: int | None = None
    # Processes of a tool on each of its nodes, started as training's ranks are, with a GPU each where the cluster has
    # any; null: one process, without a GPU.
    ranks_per_node: int | None = None
    # null: the cluster's.
    time_limit: str | None = None

    def validate(self, name: str, earlier: list[str]) -> None:
        """Raise ValueError for a job that is neither or both, or that waits for one that is not there."""
        check_name("jobs", name)
        check(
            (self.experiment is None) != (self.module is None),
            f"jobs.{name} must have either experiment ({self.experiment}) or module ({self.module}); set exactly one.",
        )
        check(
            self.experiment is not None or not self.overrides,
            f"jobs.{name}.overrides {self.overrides} have no effect on a tool; use arguments.",
        )
        check(
            self.module is not None or not self.arguments,
            f"jobs.{name}.arguments {self.arguments} have no effect on a training run; use overrides.",
        )
        check(
            self.module is None or all(part.isidentifier() for part in self.module.split(".")),
            f"jobs.{name}.module ({self.module!r}) must be the dotted name of a Python module.",
        )
        check(
            self.nodes > 0 and (self.min_nodes is None or 0 < self.min_nodes <= self.nodes),
            f"jobs.{name}.nodes, min_nodes ({self.nodes}, {self.min_nodes}) must satisfy 0 < min_nodes <= nodes.",
        )
        check(
            self.module is None or self.nodes == 1 or self.ranks_per_node is not None,
            f"jobs.{name}.nodes ({self.nodes}) must be 1 for a tool that is one process; set ranks_per_node for "
            "one that runs on several ranks.",
        )
        check(
            self.ranks_per_node is None or (self.module is not None and self.ranks_per_node > 0),
            f"jobs.{name}.ranks_per_node ({self.ranks_per_node}) must be positive and belong to a tool; training "
            "takes cluster.ranks_per_node.",
        )
        if self.time_limit is not None:
            time_limit_seconds(self.time_limit)
        for other in self.after or []:
            check(
                other in earlier,
                f"jobs.{name}.after ({other}) must name a job listed before it: {', '.join(earlier) or 'none'}.",
            )


@dataclass
class RequeueConfig:
    """When a job that ended without finishing is started again. A stop for time or preemption always is."""

    # Crashes in a row without a new checkpoint after which it stays down.
    max_crashes_without_progress: int = 3
    # Crashes in all, however much progress lies between them.
    max_crashes: int = 20

    def validate(self) -> None:
        """Raise ValueError for bounds below one."""
        check(
            self.max_crashes_without_progress >= 1 and self.max_crashes >= 1,
            f"requeue.max_crashes_without_progress, max_crashes ({self.max_crashes_without_progress}, "
            f"{self.max_crashes}) must be at least 1; 1 never starts again after a crash.",
        )


@dataclass
class LaunchConfig:
    """A chain on a cluster."""

    # The chain's folder is root/name; a single experiment takes both from its run.root and run.name.
    name: str = MISSING
    root: str = "runs"
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    jobs: dict[str, JobSpec] = field(default_factory=dict)
    requeue: RequeueConfig = field(default_factory=RequeueConfig)
    # What the user brings, by name: a chain's jobs use it as ${inputs.NAME}; ??? where there is no default.
    inputs: dict[str, str] = field(default_factory=dict)
    # Where the shipped recipes lie, wherever a chain is started: jobs use it as ${recipes}.
    recipes: str = str(RECIPES)
    # What every rank of a training job runs; another module must keep the same exit codes and run folder.
    train_module: str = "megatron_dllm.train"

    def validate(self) -> None:
        """Raise ValueError where the chain or the cluster is impossible."""
        check_name("name", self.name)
        self.cluster.validate()
        self.requeue.validate()
        check(len(self.jobs) > 0, "jobs ({}) must name at least one job.")
        names = list(self.jobs)
        for position, (name, spec) in enumerate(self.jobs.items()):
            spec.validate(name, names[:position])
            check(
                (spec.ranks_per_node or 0) <= self.cluster.num_ranks_per_node or not self.cluster.gpus_per_node,
                f"jobs.{name}.ranks_per_node ({spec.ranks_per_node}) must not exceed the cluster's "
                f"({self.cluster.num_ranks_per_node}): every rank needs a GPU of its own; raise nodes instead.",
            )


@dataclass(frozen=True)
class Job:
    """A job resolved: what runs, where it writes, and a hash over all that its result depends on.

    Args:
        name: of the job.
        spec: as the recipe gave it.
        after: names of the jobs it waits for.
        arguments: of the interpreter, `-m module ...`; a training job gets its frozen config's path when started.
        config: resolved configuration of a training job, else None.
        config_text: the same as YAML that Hydra reads back.
        run_folder: where a training job writes, else None.
        digest: sha256 over command, configuration and the digests of the jobs before.
    """

    name: str
    spec: JobSpec
    after: tuple[str, ...]
    arguments: tuple[str, ...]
    config: TrainConfig | None
    config_text: str
    run_folder: Path | None
    digest: str

    @property
    def is_training(self) -> bool:
        """Whether it is a training run rather than a tool."""
        return self.config is not None

    @property
    def is_parallel(self) -> bool:
        """Whether it runs as ranks on nodes with GPUs, where there are any, rather than as one process without."""
        return self.is_training or self.spec.ranks_per_node is not None

    def ranks_per_node(self, cluster: ClusterConfig) -> int:
        """Its processes on each node."""
        return cluster.num_ranks_per_node if self.is_training else self.spec.ranks_per_node or 1


@dataclass(frozen=True)
class Chain:
    """All jobs in order, and the folder that the chain keeps its books in."""

    config: LaunchConfig
    folder: Path
    jobs: tuple[Job, ...]

    def job_folder(self, job: Job) -> Path:
        """Frozen command, script, attempts and logs of a job."""
        return self.folder / "launch" / job.name

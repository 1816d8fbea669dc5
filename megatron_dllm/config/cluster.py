"""Describe a cluster: partitions, nodes, container and environment. Each file in recipes/cluster/ is one.

Read by the launcher, which turns it into jobs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megatron_dllm.config.hardware import HardwareConfig
from megatron_dllm.config.rules import check, check_choice
from megatron_dllm.run.place import check_socket_folder

CONTAINER_KINDS = ("none", "pyxis", "apptainer")
_TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d{1,3}):(\d{2}):(\d{2})$")
_MEMORY = re.compile(r"\d+[KMGT]?$")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*$")


def time_limit_seconds(text: str) -> int:
    """Seconds of `HH:MM:SS` or `DAYS-HH:MM:SS`.

    Raises:
        ValueError: the text has another format.
    """
    match = _TIME_LIMIT.match(text)
    check(match is not None, f"time_limit ({text!r}) must read HH:MM:SS or DAYS-HH:MM:SS, for example 24:00:00.")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())  # type: ignore[union-attr]
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass
class ContainerConfig:
    """Where the ranks run: directly on the node (none), or in an image by pyxis/enroot or apptainer."""

    # none: directly on the node; pyxis or apptainer: in an image.
    kind: str = "none"
    # A file (.sqsh, .sif) built from containers/Dockerfile, or the address of such an image in a registry.
    image: str | None = None
    # HOST:CONTAINER[:ro]; the project and the run folder are mounted at their own paths by themselves.
    mounts: list[str] = field(default_factory=list)
    # Interpreter inside the image.
    python: str = "python"

    def validate(self) -> None:
        """Raise ValueError for an unknown kind, a missing image, or a mount that does not read HOST:CONTAINER."""
        check_choice("cluster.container.kind", self.kind, CONTAINER_KINDS)
        check(
            self.kind == "none" or bool(self.image),
            f"cluster.container.image (null) is needed with kind {self.kind}; name a file or a registry address.",
        )
        check(
            self.kind != "none" or not self.image,
            f"cluster.container.image ({self.image}) has no effect with kind none; set kind to pyxis or apptainer.",
        )
        for mount in self.mounts:
            check(
                mount.count(":") in (1, 2) and mount.startswith("/") and "," not in mount,
                f"cluster.container.mounts ({mount}) must read /HOST:/CONTAINER or /HOST:/CONTAINER:ro.",
            )


@dataclass
class ClusterConfig:
    """One cluster, written once and used by every run.

    Times in seconds unless the name says otherwise; memory in GiB of 2^30 bytes; bandwidths in GB/s (10^9 bytes).
    """

    # SLURM's --partition; null: the cluster's default.
    partition: str | None = None
    # SLURM's --account; null: the user's default.
    account: str | None = None
    # SLURM's --qos; null: the user's default.
    qos: str | None = None
    # SLURM's --constraint, features that nodes must have; null: none.
    constraint: str | None = None
    # SLURM's --reservation; null: none.
    reservation: str | None = None
    # 0: a cluster without GPUs; the ranks then run on the CPU with gloo.
    gpus_per_node: int = 8
    # SLURM's name of the GPU type, for --gpus-per-node=TYPE:N; null: any.
    gpu_type: str | None = None
    # Training processes per node; null: one per GPU.
    ranks_per_node: int | None = None
    # CPUs of a node, shared out evenly: a rank gets so many of its own. null: all ranks of a node share what there is.
    cpus_per_node: int | None = None
    # SLURM's --mem; "0" is the whole node's.
    memory: str = "0"
    # Take whole nodes.
    is_exclusive: bool = True
    # Longest time SLURM gives one job; a longer run is requeued and goes on by itself.
    time_limit: str = "24:00:00"
    # How long before the time limit a run is told to save and stop: time for a step and a save, and 60 more.
    stop_seconds: int = 600
    # Jobs without GPUs (convert, merge, export) go here; null: the same partition.
    cpu_partition: str | None = None
    # SLURM's --mem of jobs without GPUs.
    cpu_memory: str = "0"
    # CPUs of a job without GPUs; null: as many as SLURM gives.
    cpu_cpus: int | None = None
    # Interpreter of the nodes; null: the one that submits. It runs the job's supervisor; without a container the ranks.
    python: str | None = None
    container: ContainerConfig = field(default_factory=ContainerConfig)
    # What `module load` takes before the first command.
    modules: list[str] = field(default_factory=list)
    # Environment variables of the job, for example NCCL and InfiniBand settings.
    environment: dict[str, str] = field(default_factory=dict)
    # More sbatch options, each entry one whole option: "--switches=1".
    sbatch_options: list[str] = field(default_factory=list)
    # Fast local folder of a node for temporary files, of at most 72 bytes, as sockets lie below it; null: the system's.
    scratch: str | None = None
    # Where runs go unless they say otherwise (root of a chain, run.root of an experiment). All nodes must share it.
    run_root: str | None = None
    # Examine every node before each start of a run: GPUs, memory, collectives, disk, clock, versions.
    is_preflight_on: bool = True
    # Free disk space under the run folder below which the preflight refuses, in GiB.
    min_free_disk_gib: float = 1.0
    # Free memory of a node (not its GPUs') below which the preflight refuses, in GiB.
    min_free_memory_gib: float = 1.0
    # Bandwidth that a good node reaches between its GPUs; the preflight names nodes below half of it. 0: compare with
    # the other nodes only.
    node_bandwidth_gb_per_s: float = 0.0
    # The same of the network between nodes.
    network_bandwidth_gb_per_s: float = 0.0
    # What a GPU and its links are rated at; a plan needs it, a launch does not.
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    @property
    def num_ranks_per_node(self) -> int:
        """Training processes per node."""
        return self.ranks_per_node if self.ranks_per_node is not None else max(self.gpus_per_node, 1)

    def validate(self) -> None:
        """Raise ValueError for values that cannot make a job.

        Raises:
            ValueError: naming the field, its value, the rule and the remedy.
        """
        self.container.validate()
        self.hardware.validate()
        self._check_numbers()
        self._check_words()
        if self.scratch:
            check_socket_folder("cluster.scratch", self.scratch)
        if "TMPDIR" in self.environment:
            check_socket_folder("cluster.environment.TMPDIR", self.environment["TMPDIR"])

    def _check_numbers(self) -> None:
        check(
            self.gpus_per_node >= 0,
            f"cluster.gpus_per_node ({self.gpus_per_node}) must not be negative; 0 means CPU nodes.",
        )
        check(
            self.num_ranks_per_node > 0,
            f"cluster.ranks_per_node ({self.ranks_per_node}) must be positive; null means one per GPU.",
        )
        check(
            self.gpus_per_node == 0 or self.num_ranks_per_node <= self.gpus_per_node,
            f"cluster.ranks_per_node ({self.ranks_per_node}) must not exceed gpus_per_node ({self.gpus_per_node}): "
            "every rank needs a GPU of its own.",
        )
        check(
            self.cpus_per_node is None or self.cpus_per_node >= self.num_ranks_per_node,
            f"cluster.cpus_per_node ({self.cpus_per_node}) must give each of the {self.num_ranks_per_node} ranks of "
            "a node a CPU; set it to null to ask for none.",
        )
        check(
            self.cpu_cpus is None or self.cpu_cpus > 0,
            f"cluster.cpu_cpus ({self.cpu_cpus}) must be positive; set it to null to ask for none.",
        )
        limit = time_limit_seconds(self.time_limit)
        check(
            0 < self.stop_seconds < limit,
            f"cluster.stop_seconds ({self.stop_seconds}) must lie between 0 and the time limit ({limit} s).",
        )

    def _check_words(self) -> None:
        for name in ("memory", "cpu_memory"):
            value = getattr(self, name)
            check(
                _MEMORY.match(value) is not None,
                f"cluster.{name} ({value!r}) must be a number with K, M, G or T behind it, as 64G; 0 is the whole "
                "node's.",
            )
        for name in self.environment:
            check(
                _VARIABLE.match(name) is not None,
                f"cluster.environment ({name!r}) is not the name of an environment variable; use letters, digits "
                "and underscores.",
            )
        for name in ("partition", "account", "qos", "constraint", "reservation", "cpu_partition", "gpu_type"):
            value = getattr(self, name)
            check(
                value is None or (value.isprintable() and " " not in value and value != ""),
                f"cluster.{name} ({value!r}) must be a word without spaces; set it to null to leave it out.",
            )
        for option in self.sbatch_options:
            check(
                option.startswith("--") and option.isprintable(),
                f"cluster.sbatch_options ({option!r}) must be whole long options such as --switches=1.",
            )
        for module in self.modules:
            check(
                re.match(r"[A-Za-z0-9][A-Za-z0-9._/+-]*$", module) is not None,
                f"cluster.modules ({module!r}) is not a module's name; use letters, digits and ._/+-.",
            )

"""A job as SLURM gets it: sbatch's options, the script, and what the job's supervisor needs to know.

Nothing a user writes is ever shell code: sbatch's options are passed as separate words, the script gets its few
values quoted, and everything else lies in job.json.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from launch.jobs import Chain, Job
from launch.world import schedule_stages, spread
from megatron_dllm.config.cluster import ClusterConfig, time_limit_seconds

# Seconds before SLURM's limit at which an unfinished stop is given up and the job requeued: limits are checked only
# every 30 seconds, and the requeue itself needs time.
REQUEUE_MARGIN = 60

_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")


def valid_nodes(chain: Chain, job: Job) -> list[int]:
    """Numbers of nodes on which the job can run, from its largest down.

    Raises:
        ValueError: it does not fit on its full number of nodes.
    """
    spec, ranks = job.spec, chain.config.cluster.num_ranks_per_node
    if job.config is None:
        return [spec.nodes]
    job.config.validate(spec.nodes * ranks)
    least = 1
    for stage in schedule_stages(job.config):
        needed, _ = spread(stage["world_size"] or 1, ranks)
        if needed > spec.nodes:
            raise ValueError(
                f"schedule.stages.{stage['name']}.world_size ({stage['world_size']}) needs {needed} nodes "
                f"of {ranks} ranks; nodes is {spec.nodes}: raise it."
            )
        least = max(least, needed)
    counts = [spec.nodes]
    for count in range(spec.nodes - 1, max(spec.min_nodes or spec.nodes, least) - 1, -1):
        try:
            job.config.validate(count * ranks)
        except ValueError:
            continue
        counts.append(count)
    return counts


def _time(seconds: int) -> str:
    minutes, second = divmod(seconds, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{second:02d}"


def sbatch_options(chain: Chain, job: Job, project: Path) -> list[str]:
    """The options of sbatch for a job, without its dependency."""
    cluster, spec = chain.config.cluster, job.spec
    folder = chain.job_folder(job).absolute()
    counts = valid_nodes(chain, job)
    seconds = time_limit_seconds(spec.time_limit or cluster.time_limit)
    nodes = f"{counts[-1]}-{counts[0]}" if len(counts) > 1 else str(counts[0])
    options = [
        f"--job-name={chain.config.name}.{job.name}",
        f"--nodes={nodes}",
        f"--time={_time(seconds)}",
        f"--signal=B:USR1@{stop_seconds(cluster, seconds)}",
        "--requeue",
        "--open-mode=append",
        f"--output={folder / 'slurm.log'}",
        f"--chdir={project}",
    ]
    is_on_cpu = not job.is_parallel
    partition = cluster.cpu_partition or cluster.partition if is_on_cpu else cluster.partition
    named = {
        "partition": partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "reservation": cluster.reservation,
        "constraint": None if is_on_cpu else cluster.constraint,
        "mem": cluster.cpu_memory if is_on_cpu else cluster.memory,
    }
    options += [f"--{name}={value}" for name, value in named.items() if value is not None]
    if not is_on_cpu and cluster.gpus_per_node:
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        # A tool's ranks get a GPU each; training has its nodes to itself, with all they have.
        options.append(f"--gpus-per-node={kind}{job.spec.ranks_per_node or cluster.gpus_per_node}")
    tasks, cpus = job.ranks_per_node(cluster), cpus_per_rank(cluster, job)
    if len(counts) > 1:
        # With a number of tasks a node, SLURM gives a range's smallest number of nodes, however many are free.
        options.append(f"--mincpus={tasks * (cpus or 1)}")
    else:
        options += [f"--ntasks-per-node={tasks}", *([f"--cpus-per-task={cpus}"] if cpus else [])]
    if cluster.is_exclusive and not is_on_cpu:
        options.append("--exclusive")
    return options + cluster.sbatch_options


def stop_seconds(cluster: ClusterConfig, limit: int) -> int:
    """How long before the time limit the stop request comes; at most three quarters of a short job's time."""
    return min(cluster.stop_seconds, max(limit * 3 // 4, 1))


def cpus_per_rank(cluster: ClusterConfig, job: Job) -> int | None:
    """CPUs of one rank, which is one task of srun's, or None to leave it to the site."""
    if not job.is_parallel:
        return cluster.cpu_cpus
    return cluster.cpus_per_node // job.ranks_per_node(cluster) if cluster.cpus_per_node else None


def container_words(cluster: ClusterConfig, folders: list[Path]) -> tuple[list[str], list[str]]:
    """What a container adds: options of srun (pyxis), and words before the command (apptainer).

    Args:
        cluster: the cluster.
        folders: mounted at their own paths: project, run folders, code.
    """
    container = cluster.container
    mounts = [*container.mounts, *(f"{path}:{path}" for path in dict.fromkeys(folders))]
    if container.kind == "pyxis":
        return [
            f"--container-image={container.image}",
            f"--container-mounts={','.join(mounts)}",
            "--no-container-mount-home",
        ], []
    if container.kind == "apptainer":
        binds = [word for mount in mounts for word in ("--bind", mount)]
        return [], ["apptainer", "exec", *(["--nv"] if cluster.gpus_per_node else []), *binds, str(container.image)]
    return [], []


def supervisor_details(chain: Chain, job: Job, code: Path, project: Path) -> dict[str, Any]:
    """What the job's supervisor needs beyond the frozen command."""
    cluster = chain.config.cluster
    seconds = time_limit_seconds(job.spec.time_limit or cluster.time_limit)
    writes = [project, chain.folder.absolute(), *([job.run_folder.absolute()] if job.run_folder else [])]
    srun, prefix = container_words(cluster, writes)
    cpus = cpus_per_rank(cluster, job)
    if cpus:
        srun.append(f"--cpus-per-task={cpus}")
    else:
        # Nobody has said how many cores a rank gets: all may use all, where a site's default may bind each to one.
        srun.append("--cpu-bind=none")
    has_container = cluster.container.kind != "none"
    return {
        "code": str(code),
        "valid_nodes": valid_nodes(chain, job),
        "stages": schedule_stages(job.config) if job.config else [],
        "srun_options": srun,
        "command_prefix": prefix,
        "rank_python": cluster.container.python if has_container else job_python(cluster),
        "give_up_seconds": max(stop_seconds(cluster, seconds) - REQUEUE_MARGIN, stop_seconds(cluster, seconds) // 2),
        "max_crashes_without_progress": chain.config.requeue.max_crashes_without_progress,
        "max_crashes": chain.config.requeue.max_crashes,
        "preflight": {
            "is_on": cluster.is_preflight_on and job.is_training,
            "gpus": cluster.gpus_per_node,
            "min_free_disk_gib": cluster.min_free_disk_gib,
            "min_free_memory_gib": cluster.min_free_memory_gib,
            "node_bandwidth_gb_per_s": cluster.node_bandwidth_gb_per_s,
            "network_bandwidth_gb_per_s": cluster.network_bandwidth_gb_per_s,
        },
        "packages": str(chain.folder.absolute() / "launch" / "packages.txt"),
    }


def job_python(cluster: ClusterConfig) -> str:
    """Interpreter of the nodes: the cluster's, or the one that submits."""
    return cluster.python or sys.executable


def is_secret(name: str) -> bool:
    """Whether a variable of the environment is one that others must not read, judged by its name."""
    return any(word in name.upper() for word in _SECRET)


def job_script(chain: Chain, job: Job, code: Path, project: Path, is_masked: bool = False) -> str:
    """The script given to sbatch: modules, environment, then the supervisor in the shell's place.

    `exec` matters: SLURM sends the signal before the time limit to the batch shell alone, and that process has then
    become the supervisor.

    Args:
        chain: the chain.
        job: one of its jobs.
        code: the frozen copy of the source tree.
        project: the working directory of the job.
        is_masked: whether secret values are left out, for people to read.
    """
    cluster = chain.config.cluster
    given = {k: "***" if is_masked and is_secret(k) else value for k, value in cluster.environment.items()}
    environment = {**given, "PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    if cluster.scratch:
        environment["TMPDIR"] = cluster.scratch
    lines = [
        "#!/bin/bash",
        f"# {chain.config.name}.{job.name}, written by launch/submit.py; its settings are in job.json beside it.",
    ]
    if cluster.modules:
        lines += [
            "# shellcheck disable=SC1091",
            "type module >/dev/null 2>&1 || . /etc/profile",
            "module load " + " ".join(shlex.quote(name) for name in cluster.modules) + " || exit 1",
        ]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines += [
        f"cd -- {shlex.quote(str(project))} || exit 1",
        "exec "
        + " ".join(
            shlex.quote(word)
            for word in [
                job_python(cluster),
                str(code / "launch" / "supervise.py"),
                str(chain.job_folder(job).absolute()),
            ]
        ),
    ]
    return "\n".join(lines) + "\n"

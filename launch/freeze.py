"""What makes a run repeatable: its code, its configuration and its packages, copied beside its results.

These lie in the chain's folder:

    CHAIN/launch/code_0a1b2c/    the source tree as it was, so a job in the queue does not see later edits
    CHAIN/launch/commit.txt, diff.patch, packages.txt
    CHAIN/launch/JOB/job.json, config.yaml
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from launch.jobs import Chain, Job
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.run.code_version import FROZEN_STATE, ROOT, code_state, git
from megatron_dllm.run.files import write_json, write_text
from megatron_dllm.run.names import CONFIG

# Larger files are data, not source.
MAX_SOURCE_BYTES = 1 << 20
_PACKAGES = ("megatron_dllm", "checkpoints_tools", "launch", "recipes")


def installed_packages() -> list[str]:
    """`name==version` of every installed distribution, sorted."""
    found = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return [f"python=={sys.version.split()[0]}", *sorted(found, key=str.lower)]


def _source_files() -> list[Path]:
    """Tracked and new source files relative to the project, without what git ignores."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed is not None:
        names = [Path(name) for name in listed.split("\0") if name]
    else:
        names = [
            p.relative_to(ROOT)
            for package in _PACKAGES
            for p in (ROOT / package).rglob("*")
            if "__pycache__" not in p.parts
        ]
    return sorted(n for n in names if (ROOT / n).is_file() and (ROOT / n).stat().st_size <= MAX_SOURCE_BYTES)


def freeze_code(launch_folder: Path) -> Path:
    """Copy the source tree under a name made of its content's hash; an equal copy is used again.

    Returns:
        The copy's absolute path, to be put first on PYTHONPATH.
    """
    files = _source_files()
    digest = hashlib.sha256()
    for name in files:
        digest.update(str(name).encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    target = launch_folder.absolute() / f"code_{digest.hexdigest()[:12]}"
    if not target.exists():
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, temporary / name)
        (temporary / FROZEN_STATE).write_text(code_state(), encoding="utf-8")
        os.replace(temporary, target)
    return target


def freeze_environment(launch_folder: Path) -> None:
    """Write the git commit, the difference to it, and the package list."""
    commit, _, changes = code_state().partition("\n")
    (launch_folder / "commit.txt").write_text(commit + "\n", encoding="utf-8")
    (launch_folder / "diff.patch").write_text(changes, encoding="utf-8")
    (launch_folder / "packages.txt").write_text("\n".join(installed_packages()) + "\n", encoding="utf-8")


def rank_arguments(chain: Chain, job: Job) -> list[str]:
    """The interpreter's arguments of one rank; a training job reads its frozen configuration."""
    if not job.is_training:
        return list(job.arguments)
    folder = chain.job_folder(job).absolute()
    return [*job.arguments, "--config-dir", str(folder), "--config-name", "config"]


def freeze_job(chain: Chain, job: Job, **details: Any) -> Path:
    """Write a job's configuration and command; the folder they lie in.

    Args:
        chain: the chain.
        job: one of its jobs.
        details: what else the job's supervisor has to know (valid_nodes, container, ...).
    """
    folder = chain.job_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    if job.is_training:
        text = f"# Frozen by the launcher; the run reads this file whenever it is started again.\n{job.config_text}"
        write_text(folder / CONFIG, text)
    cluster: ClusterConfig = chain.config.cluster
    write_json(
        folder / "job.json",
        {
            "chain": chain.config.name,
            "name": job.name,
            "digest": job.digest,
            "is_training": job.is_training,
            "arguments": rank_arguments(chain, job),
            "run_folder": str(job.run_folder.absolute()) if job.run_folder else None,
            "output": job.spec.output,
            "nodes": job.spec.nodes,
            "ranks_per_node": job.ranks_per_node(cluster),
            **details,
        },
    )
    return folder

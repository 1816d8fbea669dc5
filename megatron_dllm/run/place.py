"""This process's place in the run, read from the environment that the launcher sets (standard library only).

Pods, notebooks and shells leave such variables behind, so none is believed alone: without RANK a process is a run of
its own, and what then speaks of several ranks is refused instead of being guessed at.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

# What a launcher sets for its ranks; one that starts processes of its own must not hand on another launcher's.
_OF_A_LAUNCHER = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEP_NUM_TASKS"),
)
# Of the 107 bytes of a socket's path, the longest name below it takes 34: /torch-shm-dir-XXXXXX/manager.sock.
_LONGEST_TEMPORARY = 72
_START = (
    "start the ranks with torchrun --nproc_per_node N -m MODULE ..., or on SLURM with launch/submit.py, which set all "
    "variables"
)


@dataclass(frozen=True)
class Place:
    """Where a process stands among the ranks of its run.

    Attributes:
        rank: its number in the run.
        world_size: ranks of the run.
        local_rank: its number on its machine, which is that of its GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def read_place(environment: Mapping[str, str] | None = None) -> Place:
    """The place that the launcher's variables give; one rank without a launcher.

    Args:
        environment: to read; None: this process's.

    Raises:
        ValueError: variables that contradict each other, or are no numbers.
    """
    environment = os.environ if environment is None else environment
    world_size = _number(environment, "WORLD_SIZE", 1)
    if "RANK" not in environment:
        _check_alone(environment, world_size)
        return Place()
    rank = _number(environment, "RANK", 0)
    if "WORLD_SIZE" not in environment and rank > 0:
        raise ValueError(f"RANK ({rank}) is set and WORLD_SIZE is not; {_START}, or unset RANK for one process.")
    if rank >= world_size:
        raise ValueError(
            f"RANK ({rank}) must be below WORLD_SIZE ({world_size}); {_START}, or unset both for one process."
        )
    if world_size == 1:
        return Place(local_rank=_number(environment, "LOCAL_RANK", 0))
    _check_meeting_point(environment)
    return Place(rank, world_size, _number(environment, "LOCAL_RANK", 0))


def _check_alone(environment: Mapping[str, str], world_size: int) -> None:
    """Refuse to be one run beside others where the environment speaks of several ranks."""
    num_tasks = slurm_tasks(environment)
    if "SLURM_PROCID" in environment and num_tasks > 1:
        raise ValueError(
            f"SLURM_NTASKS ({num_tasks}) says that SLURM runs {num_tasks} tasks, and RANK is not set: each would be a "
            f"run of its own, in one folder; {_START}, or use srun --ntasks=1 for one process."
        )
    if world_size > 1:
        raise ValueError(f"WORLD_SIZE ({world_size}) is set and RANK is not; {_START}, or unset WORLD_SIZE.")


def _check_meeting_point(environment: Mapping[str, str]) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if not environment.get(name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} (none) must be set for several ranks; {_START}.")
    port = _number(environment, "MASTER_PORT", 0)
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT ({port}) must be a port, 1 to 65535; {_START}.")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name)
    if text is None:
        return default
    least = 1 if name == "WORLD_SIZE" else 0
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise ValueError(
            f"{name} ({text!r}) must be a whole number of at least {least}; unset it for one process, or {_START}."
        )
    return int(text)


def slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the SLURM step that this process belongs to, as far as its variables say; 1 outside SLURM."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    return next((int(environment[name]) for name in names if environment.get(name, "").isdecimal()), 1)


def require_one_process(what: str) -> None:
    """Refuse to do the work of one process on several ranks.

    Args:
        what: the work, for the message.

    Raises:
        ValueError: this process is one of several.
    """
    is_step = "SLURM_STEP_NUM_TASKS" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0"
    count = slurm_tasks(os.environ) if is_step and "RANK" not in os.environ else 1
    if "RANK" in os.environ or os.environ.get("WORLD_SIZE") is not None:
        count = max(count, _number(os.environ, "WORLD_SIZE", 1))
    if count > 1:
        raise ValueError(
            f"WORLD_SIZE ({count}) must be 1: {what} runs in one process; start it with python -m, not with torchrun "
            "or several tasks, and unset RANK and WORLD_SIZE where the shell has inherited them."
        )


def check_temporary_folder() -> None:
    """Refuse a folder for temporary files in which worker processes could not listen, and would be waited for.

    Raises:
        ValueError: its path is too long.
    """
    check_socket_folder("TMPDIR", tempfile.gettempdir())


def check_socket_folder(name: str, folder: str) -> None:
    """Refuse a folder for temporary files whose path leaves no room for the sockets below it.

    Args:
        name: of the variable or key that says so, for the message.
        folder: its value.

    Raises:
        ValueError: it is too long.
    """
    if len(os.fsencode(folder)) > _LONGEST_TEMPORARY:
        raise ValueError(
            f"{name} ({folder}) must be at most {_LONGEST_TEMPORARY} bytes long: the sockets of worker processes lie "
            f"below it, and the kernel limits their paths; set {name} to a shorter folder, such as /tmp."
        )


def world_size() -> int:
    """Number of ranks; 1 without a launcher.

    Raises:
        ValueError: the environment is nonsense (`read_place`).
    """
    return read_place().world_size


def is_rank_zero() -> bool:
    """Whether this process is the first of the run: the one that logs and writes shared files.

    Where the environment is nonsense every process is, so that one says so.
    """
    try:
        return read_place().rank == 0
    except ValueError:
        return True


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the place that another launcher has given this process."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_A_LAUNCHER and not name.startswith("TORCHELASTIC_")
    }

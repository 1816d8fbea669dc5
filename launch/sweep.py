"""Sweeps on SLURM through Hydra's submitit launcher: gives each of its tasks the variables torchrun would have set.

    python -m megatron_dllm.train --multirun experiment=NAME +sweep=slurm KEY=VALUE,VALUE ...

For studies of many short runs. Each is one SLURM task a rank; there is no requeue policy, lease or preflight here.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

from hydra.experimental.callback import Callback

from launch.rank import adopt_slurm_ranks

_FIRST_PORT, _PORTS = 32000, 700


class RankEnvironment(Callback):
    """Hydra callback (recipes/sweep/slurm.yaml) that runs in every task before training."""

    def on_job_start(self, config: Any, **_: Any) -> None:
        """Set RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous from SLURM's variables; nothing outside SLURM."""
        if "SLURM_PROCID" not in os.environ or "RANK" in os.environ:
            return
        environment: dict[str, str] = dict(os.environ)
        # submitit's tasks know their node's share only as "2(x4)".
        environment.setdefault("SLURM_NTASKS_PER_NODE", environment["SLURM_TASKS_PER_NODE"].split("(")[0])
        adopt_slurm_ranks(environment)
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        environment["MASTER_ADDR"] = hosts[0]
        environment["MASTER_PORT"] = str(_FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _PORTS)
        os.environ.update(environment)

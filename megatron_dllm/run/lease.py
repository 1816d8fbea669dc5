"""The right to write a run folder, held by one attempt at the run at a time (standard library only).

An attempt is one start of a run's processes. When a node's daemon dies, SLURM starts the job again elsewhere while the
old processes still run; both would write the same checkpoints. So every attempt takes a generation number, one above
all earlier ones, and the highest generation owns the folder. An older attempt that checks
(`check`) stops without writing. It may still rename a checkpoint into place just after its check, but a checkpoint is
always complete when it is renamed.

Files in RUN/lease/: `generation_000007` is created exclusively and so decides who is the seventh; `current` names
the newest and is overwritten in place, because opening an existing file is what network file systems revalidate,
while a listing may come from a cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_dllm.run.files import naming
from megatron_dllm.run.names import LEASE

# Set by the job script: the generation its launcher acquired for this start of the run.
LEASE_VARIABLE = "MEGATRON_DLLM_LEASE"
_GENERATION = re.compile(r"generation_(\d+)$")


class LeaseLost(RuntimeError):
    """A newer attempt at the run owns the folder; the process must end with EXIT_FENCED and write nothing."""


@dataclass(frozen=True)
class Lease:
    """One attempt's claim on a run folder.

    Args:
        folder: the run folder's `lease` directory.
        generation: this attempt's number; the highest one owns the run folder.
    """

    folder: Path
    generation: int

    @classmethod
    def acquire(cls, run_folder: str | os.PathLike[str], owner: str = "") -> Lease:
        """Adopt the generation that the launcher acquired (MEGATRON_DLLM_LEASE), or take the next one.

        Args:
            run_folder: folder of the run; created if missing.
            owner: who takes the lease, for people who read the file (default: host and process).

        Raises:
            LeaseLost: the launcher's generation has already been superseded.
        """
        inherited = os.environ.get(LEASE_VARIABLE)
        if inherited:
            lease = cls(Path(run_folder) / LEASE, int(inherited))
            lease.check()
            return lease
        return cls.take_next(run_folder, owner)

    @classmethod
    def take_next(cls, run_folder: str | os.PathLike[str], owner: str = "") -> Lease:
        """Take the generation above all others, superseding every earlier attempt."""
        folder = Path(run_folder) / LEASE
        folder.mkdir(parents=True, exist_ok=True)
        record = json.dumps({"owner": owner or f"{socket.gethostname()}:{os.getpid()}", "time": time.time()})
        while True:
            lease = cls(folder, newest_generation(folder) + 1)
            try:
                descriptor = os.open(lease._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                continue
            with naming(lease._path), os.fdopen(descriptor, "w") as file:
                file.write(record + "\n")
            lease._announce()
            return lease

    @property
    def _path(self) -> Path:
        return self.folder / f"generation_{self.generation:06d}"

    def _announce(self) -> None:
        """Write the generation into `current` in place, never lowering it."""
        descriptor = os.open(self.folder / "current", os.O_CREAT | os.O_RDWR, 0o644)
        with naming(self.folder / "current"), os.fdopen(descriptor, "r+") as file:
            text = file.read().strip()
            if text.isdigit() and int(text) >= self.generation:
                return
            file.seek(0)
            file.write(f"{self.generation:06d}\n")
            file.flush()
            os.fsync(file.fileno())

    def is_current(self) -> bool:
        """True until a newer attempt exists."""
        return newest_generation(self.folder) <= self.generation

    def check(self) -> None:
        """Raise LeaseLost when a newer attempt exists. Cheap: one open, one listing."""
        newest = newest_generation(self.folder)
        if newest > self.generation:
            raise LeaseLost(
                f"generation ({self.generation}) of {self.folder.parent} was superseded by {newest}: another attempt "
                "at this run has started and owns the folder; this one ends without writing."
            )


def newest_generation(folder: str | os.PathLike[str]) -> int:
    """The highest generation in a lease folder; 0 where there is none."""
    numbers = [0]
    # An attempt may have ended between taking its number and announcing it.
    with contextlib.suppress(FileNotFoundError), open(Path(folder) / "current", encoding="ascii") as file:
        text = file.read().strip()
        numbers += [int(text)] if text.isdigit() else []
    with contextlib.suppress(FileNotFoundError):
        numbers += [int(m[1]) for m in map(_GENERATION.search, os.listdir(folder)) if m]
    return max(numbers)

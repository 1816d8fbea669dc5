"""The curves of a run in TensorBoard and W&B. Both show what metrics.jsonl holds, also after a kill.

A killed run has drawn steps behind its last checkpoint, which the next start draws again. metrics.jsonl is cut back.
TensorBoard is told to forget them. W&B never takes a step back: unless its run is on the server, was closed in order
and nothing was cut, the next start opens a new run in the same group and gives it all records that stay.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megatron_dllm.config import TrainConfig
from megatron_dllm.run.files import write_text
from megatron_dllm.run.names import TENSORBOARD, WANDB_ID
from megatron_dllm.training.observers.metrics_file import Record, numbers_of

log = logging.getLogger(__name__)


class Curves(Protocol):
    """Takes numbers by name, in the order of steps."""

    def write(self, record: Record) -> None:
        """Draw a record's numbers at its step."""

    def flush(self) -> None:
        """Put on disk what was drawn: a checkpoint follows, and with it the records are the run's."""

    def close(self) -> None:
        """Write out what is left."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, run_folder: Path, records: Sequence[Record]) -> None:
        """Open the files.

        Args:
            run_folder: of the run.
            records: that metrics.jsonl holds; the last step is drawn anew, and what lies behind it forgotten.
        """
        from torch.utils.tensorboard import SummaryWriter

        last = records[-1]["step"] if records else 0
        self._writer: Any = SummaryWriter(str(run_folder / TENSORBOARD), purge_step=last)
        for record in records:
            if record["step"] == last:
                self.write(record)

    def write(self, record: Record) -> None:
        """Draw a record's numbers at its step."""
        for name, value in numbers_of(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """Put on disk what was drawn."""
        self._writer.flush()

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


class WandB:
    """A W&B run, or its folder where there is no network."""

    def __init__(self, run_folder: Path, config: TrainConfig, mode: str, records: Sequence[Record]) -> None:
        """Open the run.

        Args:
            run_folder: of the run.
            config: of the run.
            mode: online or offline.
            records: that metrics.jsonl holds.
        """
        import wandb

        self._path = run_folder / WANDB_ID
        earlier = closed_run(run_folder) if mode == "online" else None
        self._id = earlier or os.urandom(6).hex()
        write_text(self._path, f"{self._id}\n")
        self._mode = mode
        arguments: dict[str, Any] = {
            "project": config.logging.wandb_project,
            "name": config.run.name,
            "group": config.run.name,
            "dir": str(run_folder),
            "id": self._id,
            "config": asdict(config),
        }
        if mode == "online":
            try:
                self._run: Any = wandb.init(mode="online", resume="allow", **arguments)
            except wandb.Error as error:
                log.warning("W&B could not be reached (%s): this start writes offline, into %s", error, run_folder)
                self._mode = "offline"
        if self._mode == "offline":
            self._run = wandb.init(mode="offline", **arguments)
        for record in records if earlier is None or self._mode == "offline" else ():
            self.write(record)

    def write(self, record: Record) -> None:
        """Draw a record's numbers at its step."""
        self._run.log(numbers_of(record), step=record["step"])

    def flush(self) -> None:
        """Nothing: what a killed start has not sent is given to the next run."""

    def close(self) -> None:
        """Write out what is left; from here on the W&B run holds what metrics.jsonl holds."""
        self._run.finish()
        write_text(self._path, f"{self._id}\nclosed {self._mode}\n")


def closed_run(run_folder: Path) -> str | None:
    """The id of the W&B run on the server that an earlier start has closed; None where there is none to go on with."""
    path = run_folder / WANDB_ID
    words = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return words[0] if words[1:] == ["closed", "online"] else None


def forget_run(run_folder: Path) -> None:
    """Leave the W&B run of the earlier starts as it is: it holds records that have been cut."""
    (run_folder / WANDB_ID).unlink(missing_ok=True)

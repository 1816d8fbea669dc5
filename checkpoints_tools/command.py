"""What the tools on checkpoints have in common beside `run.command`: logging, and their threads."""

from __future__ import annotations

import logging

import torch


def prepare_tool() -> None:
    """Log to the terminal, and leave the cores to the tool's own threads."""
    # The work is moving bytes between threads of our own; torch's would only wait for each other.
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

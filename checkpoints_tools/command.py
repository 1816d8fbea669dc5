"""What the tools on checkpoints have in common beside `run.command`: logging, threads, and numbers as arguments."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

import torch


def prepare_tool() -> None:
    """Log to the terminal, and leave the cores to the tool's own threads."""
    # The work is moving bytes between threads of our own; torch's would only wait for each other.
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"({text}) must be a whole number of at least {least}")
        return int(text)

    return read

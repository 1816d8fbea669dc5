"""What the command lines have in common: logging, and one clear sentence when something is wrong."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def main_guard(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Log to the terminal; turn an error a user can cause into exit code 2 and a message."""
    # The work is moving bytes between threads of our own; torch's would only wait for each other.
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        yield
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")

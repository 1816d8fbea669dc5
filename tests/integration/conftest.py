"""What the tests of this folder share: one small run of the demo's whole chain."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.tiny_chain import run_chain_here, small_recipes
from tests.once import make_once


@pytest.fixture(scope="session")
def small_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's one run of the chain: its recipes in `recipes`, what it made in `runs/demo`. Copy, never change."""

    def make(folder: Path) -> None:
        run_chain_here(small_recipes(folder / "recipes"), folder / "runs")

    return make_once(tmp_path_factory, "small_chain", make)


@pytest.fixture(scope="session")
def demo(small_chain: Path) -> Path:
    """What that chain made. Copy what a test changes."""
    return small_chain / "runs" / "demo"

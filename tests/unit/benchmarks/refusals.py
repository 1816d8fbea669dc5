"""What a study does with words that no run of it could follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def assert_refused(main: Callable[[list[str]], int], words: list[str], message: str, folder: Path) -> None:
    """The command says so, and has written nothing into the folder."""
    with pytest.raises(ValueError, match=message):
        main(["--study", str(folder / "study"), "--output", str(folder / "table"), *words])
    assert not list(folder.iterdir())

"""Which code is running: its commit and the changes since, even in a copy that was frozen for a job."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# In the root of a frozen copy: `code_state` of the checkout it was copied from. A copy that lies inside a checkout must
# not be taken for the code that is checked out there.
FROZEN_STATE = "git.txt"
_UNKNOWN = "no git repository"


def git(*arguments: str) -> str | None:
    """What git prints in the project; None if the project is not a git checkout or git is not installed."""
    try:
        top, output = (
            subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=60, check=True
            ).stdout
            for words in (["rev-parse", "--show-toplevel"], arguments)
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return output if Path(top.strip()).resolve() == ROOT else None


def code_state() -> str:
    """The commit on the first line, then how the tracked files differ from it (git diff)."""
    frozen = ROOT / FROZEN_STATE
    if frozen.is_file():
        return frozen.read_text(encoding="utf-8")
    return f"{(git('rev-parse', 'HEAD') or _UNKNOWN).strip()}\n{git('diff', 'HEAD') or ''}"


def commit() -> str | None:
    """The commit, with "-dirty" if tracked files differ from it; None if it is unknown."""
    first, _, changes = code_state().partition("\n")
    return None if first == _UNKNOWN else first + "-dirty" * bool(changes)

"""Which code runs: its commit and what was changed since, also where a copy of it was frozen for a job."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# In the root of a frozen copy: `code_state` of the checkout it was copied from. A copy that lies inside a checkout must
# not be taken for the code that is checked out there.
FROZEN_STATE = "git.txt"
_UNKNOWN = "no git repository"


def git(*arguments: str) -> str | None:
    """Output of git in the project; None where the project is no checkout of its own, or git is not installed."""
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
    """The commit on the first line, then what tracked files differ from it (git diff)."""
    frozen = ROOT / FROZEN_STATE
    if frozen.is_file():
        return frozen.read_text(encoding="utf-8")
    return f"{(git('rev-parse', 'HEAD') or _UNKNOWN).strip()}\n{git('diff', 'HEAD') or ''}"


def commit() -> str | None:
    """The commit, with "-dirty" where tracked files differ from it; None where it is not known."""
    first, _, changes = code_state().partition("\n")
    return None if first == _UNKNOWN else first + "-dirty" * bool(changes)

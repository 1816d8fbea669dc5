"""Every command begins by listening to signals and ends by run_command."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# They start or wrap other processes, and heed signals for these; all three report by records of their own.
WRAPPERS = {"launch/rank.py", "launch/supervise.py", "launch/preflight.py"}


def _guards(path: Path) -> list[ast.If]:
    return [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    ]


COMMANDS = [
    str(path.relative_to(ROOT))
    for package in ("megatron_dllm", "checkpoints_tools", "launch")
    for path in sorted((ROOT / package).rglob("*.py"))
    if _guards(path) and str(path.relative_to(ROOT)) not in WRAPPERS
]


def test_the_commands_are_known() -> None:
    expected = {
        "megatron_dllm/train.py",
        "megatron_dllm/data/tokenize.py",
        "checkpoints_tools/compare.py",
        "launch/local.py",
    }
    assert expected <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_listens_before_it_imports_and_ends_as_all_do(name: str) -> None:
    path = ROOT / name
    first, last = _guards(path)
    assert ast.unparse(first.body[0]) == "listen()" and ast.unparse(last.body[0]) == "run_command(main)"
    before = [
        node.module
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.lineno < first.lineno
    ]
    slow = [name for name in before if str(name).partition(".")[0] not in sys.stdlib_module_names]
    assert slow == ["megatron_dllm.run.command"], "slow imports come later"

"""Process groups are read in one package and handed on."""

from __future__ import annotations

import ast
from pathlib import Path

import megatron_dllm

PACKAGE = Path(megatron_dllm.__file__).parent
# How megatron-core's process-wide groups can be reached.
NAMES = {"parallel_state", "mpu", "use_mpu_process_groups"}


def _names(path: Path) -> set[str]:
    """Every name a module imports, uses or reaches through a dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom | ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
            found |= set((getattr(node, "module", None) or "").split("."))
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found


def test_megatrons_process_wide_groups_are_read_in_the_package_parallel_alone() -> None:
    readers = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py") if _names(path) & NAMES}
    assert readers == {"parallel"}

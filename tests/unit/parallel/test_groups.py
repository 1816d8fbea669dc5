"""Process groups are read in one package and handed on."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

import megatron_dllm
from megatron_dllm.config import ParallelConfig, RunConfig

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


def test_determinism_is_the_runs_choice_and_ends_with_it() -> None:
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.parallel.groups import destroy, initialize

    for is_deterministic in (True, False):
        initialize(ParallelConfig(), RunConfig(name="run", is_deterministic=is_deterministic))
        try:
            assert torch.are_deterministic_algorithms_enabled() == is_deterministic
        finally:
            destroy()

"""A folder of recipes with small chains, beside the project's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_dllm.config.recipe_source import RECIPES

CHAIN = """# @package _global_
name: three
jobs:
  first: {module: platform, arguments: [--terse], output: "${root}/${name}/first.txt"}
  base: {experiment: tiny_base}
  convert: {experiment: tiny_convert, overrides: ["checkpoint.load=${root}/${name}/base"], after: [base]}
"""


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """The project's recipes and a chain of three jobs."""
    folder = tmp_path / "recipes"
    shutil.copytree(RECIPES, folder)
    (folder / "chain").mkdir(exist_ok=True)
    (folder / "chain" / "three.yaml").write_text(CHAIN)
    return folder

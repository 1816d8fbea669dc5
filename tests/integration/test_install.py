"""An ordinary installation (`pip install .`) brings the recipes and works from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "megatron_dllm", "checkpoints_tools", "launch", "recipes")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as pip installs them from a copy of the sources, into which it writes."""
    folder = tmp_path_factory.mktemp("install")
    (folder / "source").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(folder / "source")], check=True, capture_output=True)
    return folder / "site"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["megatron_dllm.train", "experiment=tiny_convert"], "corpus runs/demo/corpus/train has no train.bin"),
        (["megatron_dllm.train", "experiment=tiny_convrt"], "did you mean tiny_convert?"),
        (["megatron_dllm.generate", "checkpoint=x", "prompt=hi"], "checkpoint (x) is not a folder"),
        (["launch.local", "experiment=tiny_dem"], "experiment ('tiny_dem') is not a recipe; there are: "),
    ],
)
def test_commands_find_their_recipes_from_another_folder(
    site: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0 and message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())

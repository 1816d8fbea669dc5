"""The Dockerfile installs what setup.py lists, from files that exist, on a torch that is new enough."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text(encoding="utf-8")


def test_what_is_copied_exists_and_is_what_an_installation_needs() -> None:
    from tests.integration.test_install import SOURCES

    copied = [name for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert set(copied) == set(SOURCES)


def test_the_extras_are_those_of_setup() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = re.search(r'^ARG EXTRAS="(.*)"$', DOCKERFILE, re.MULTILINE)
    assert extras is not None
    assert all(f'"{name}": [' in setup for name in extras[1].split(","))


def test_the_base_is_the_one_that_the_documentation_names() -> None:
    base = re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:(\d\d)\.(\d\d)-py3$", DOCKERFILE, re.MULTILINE)
    assert base is not None
    # The first of NGC's images with a torch of 2.11 or later.
    assert (int(base[1]), int(base[2])) >= (26, 4)
    assert f"PyTorch image {base[1]}.{base[2]} " in (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["h200x8", "b200x8", "example"])
def test_the_recipes_of_clusters_take_its_image(name: str) -> None:
    text = (ROOT / "recipes" / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")
    assert re.search(r"containers/Dockerfile.*\n  image: /lustre/images/megatron_dllm\.(sqsh|sif)$", text, re.MULTILINE)

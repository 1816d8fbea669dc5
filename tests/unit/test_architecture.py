"""The page on the architecture: its picture follows the contract, its example runs."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

from docs.layers import PICTURE, ROOT, contract_layers, draw

PAGE = ROOT / "docs" / "architecture.md"


def _pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text()


def test_the_picture_is_that_of_the_contract() -> None:
    assert PICTURE.read_text() == draw(_pyproject()), "the layers have changed: python docs/layers.py"


def test_the_picture_holds_every_module_of_the_package() -> None:
    _, rooms = contract_layers(_pyproject())
    package = ROOT / "megatron_dllm"
    modules = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert {name for layer in rooms for name in layer} == modules - {"__init__"}


def test_another_layer_gives_another_picture() -> None:
    changed = _pyproject().replace('    "diffusion",', '    "diffusion | planning",')
    assert "planning" in draw(changed) and draw(changed) != draw(_pyproject())


def test_the_example_prints_what_it_says() -> None:
    assert doctest.testfile(str(PAGE), module_relative=False) == (0, 4)


def test_a_wrong_example_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(re.sub(r"\[0 0 1 1 1 1\]", "[0 1 1 1 1 1]", PAGE.read_text(), count=1))
    assert doctest.testfile(str(page), module_relative=False, verbose=False)[0] == 1

"""Draw the layers of the code from the contract that import-linter checks.

    python docs/layers.py

writes docs/images/layers.svg. A test compares the picture with the contract, so that it cannot go stale.
"""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "layers.svg"

_WIDTH, _LINE, _GAP, _TOP = 840, 34, 8, 30
_HOUSE, _ROOM = "#dfe7ee", "#cfe6e3"


def contract_layers(pyproject: str) -> tuple[list[list[str]], list[list[str]]]:
    """The layers between the packages and those inside megatron_dllm, top first.

    Args:
        pyproject: text of pyproject.toml.

    Returns:
        Two lists of layers; a layer lists the modules that stand beside each other.
    """
    contracts = tomllib.loads(pyproject)["tool"]["importlinter"]["contracts"]
    layers = {bool(contract.get("containers")): contract["layers"] for contract in contracts if "layers" in contract}
    return _split(layers[False]), _split(layers[True])


def _split(layers: list[str]) -> list[list[str]]:
    return [[name.strip() for name in layer.replace(":", "|").split("|")] for layer in layers]


def _row(names: list[str], left: int, top: int, width: int, color: str) -> list[str]:
    """One layer: a box for each of its modules, side by side."""
    each = (width - _GAP * (len(names) - 1)) / len(names)
    lines = []
    for index, name in enumerate(names):
        x = left + index * (each + _GAP)
        lines.append(f'<rect x="{x:.0f}" y="{top}" width="{each:.0f}" height="{_LINE}" rx="5" fill="{color}"/>')
        lines.append(f'<text x="{x + each / 2:.0f}" y="{top + 22}" text-anchor="middle">{escape(name)}</text>')
    return lines


def draw(pyproject: str) -> str:
    """The picture as SVG.

    Args:
        pyproject: text of pyproject.toml.
    """
    packages, rooms = contract_layers(pyproject)
    lines, top = [], _TOP
    for names in packages[:-1]:
        lines += _row(names, 10, top, _WIDTH - 20, _HOUSE)
        top += _LINE + _GAP
    height = len(rooms) * (_LINE + _GAP) + _GAP + 24
    lines.append(f'<rect x="10" y="{top}" width="{_WIDTH - 20}" height="{height}" rx="8" fill="{_HOUSE}"/>')
    lines.append(f'<text x="24" y="{top + 19}">{escape(" | ".join(packages[-1]))}</text>')
    top += 28
    for names in rooms:
        lines += _row(names, 24, top, _WIDTH - 48, _ROOM)
        top += _LINE + _GAP
    caption = "Each box may import what lies below it, never what lies beside or above it."
    style = "text{font:14px system-ui,sans-serif;fill:#1d2b36}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top + 12}" width="{_WIDTH}">',
            f"<title>Layers of the code</title><style>{style}</style>",
            f'<rect width="{_WIDTH}" height="{top + 12}" fill="#ffffff"/><text x="10" y="19">{caption}</text>',
            *lines,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw((ROOT / "pyproject.toml").read_text()))

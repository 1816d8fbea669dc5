"""The examples run, each on its default, and show what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.corpus import ROOT


def _run(module: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packed_row_draws_its_mask(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A blank line ends nothing.\n" * 40)
    picture = tmp_path / "row.png"
    output = _run("examples.packed_row", str(text), "--output", str(picture), "--two_views")
    assert "░" in output and str(picture) in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_both_ways_of_decoding_an_export_give_the_same_tokens() -> None:
    assert "the same tokens" in _run("examples.decode_export", "--max_new_tokens", "16")


@pytest.mark.slow
def test_the_loss_on_own_text_falls(tmp_path: Path) -> None:
    output = _run("examples.own_text", "--output", str(tmp_path / "run"))
    losses = [float(line.split()[3]) for line in output.splitlines() if line.startswith("step")]
    assert len(losses) > 3 and losses[-1] < losses[0] - 0.2

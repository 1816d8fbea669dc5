"""Tests that cannot run here must say so, in red, even where pytest is quiet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.ranks
def test_missing_programs_are_named_in_red(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "slurm or not slurm",
            "--color=yes",
            "-k",
            "in_the_queue or shellcheck",
            "tests/slurm/test_submission.py",
            "tests/unit/launch/test_job.py",
        ],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "\x1b[31m\x1b[1m1 test NOT RUN: no SLURM here (" in done.stdout, done.stdout
    assert "sbatch missing); apt-get install -y slurm-wlm" in done.stdout
    assert "1 test NOT RUN: no shellcheck here; apt-get install -y shellcheck" in done.stdout

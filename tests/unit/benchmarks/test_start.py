"""The benchmark of a start says where the seconds go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.ranks
def test_a_start_is_timed_up_to_its_first_step(tmp_path: Path) -> None:
    from benchmarks.start import main

    main(["--repeats", "1", "--output", str(tmp_path / "start")])
    (row,) = json.loads((tmp_path / "start.json").read_text())["rows"]
    for kind in ("cpu", "wall"):
        parts = [row[f"{part}_{kind}"] for part in ("imports", "set_up", "step")]
        assert min(parts) >= 0.0 and row[kind] == pytest.approx(sum(parts))
    assert row["imports_cpu"] > 0.5 and row["wall"] > row["imports_wall"]

"""The benchmark of a start says where the seconds go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.start import main


@pytest.mark.parametrize("option", ["ranks", "repeats"])
def test_a_number_below_one_is_refused_before_anything_is_written(option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{option} \(0\) must be positive"):
        main([f"--{option}", "0", "--output", str(tmp_path / "start")])
    assert not list(tmp_path.iterdir())


@pytest.mark.ranks
def test_a_start_is_timed_up_to_its_first_step(tmp_path: Path) -> None:
    main(["--repeats", "1", "--output", str(tmp_path / "start")])
    (row,) = json.loads((tmp_path / "start.json").read_text())["rows"]
    for kind in ("cpu", "wall"):
        parts = [row[f"{part}_{kind}"] for part in ("imports", "set_up", "step")]
        assert min(parts) >= 0.0 and row[kind] == pytest.approx(sum(parts))
    assert row["imports_cpu"] > 0.5 and row["wall"] > row["imports_wall"]

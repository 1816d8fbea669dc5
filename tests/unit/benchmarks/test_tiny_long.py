"""The table of a small run to a longer context, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_long import NAMES, main, needle_rows, position_rows


def measured(right: tuple[float, float], **others: Any) -> dict[str, Any]:
    """Two depths of one length, 4 needles each, and two ranges of positions."""
    needles = [
        {"length": 512, "depth": depth, "num_needles": 4, "accuracy": share, "nats": 20.0 + 10 * depth, "gain": depth}
        for depth, share in enumerate(right)
    ]
    by_position = [
        {
            "start": start,
            "stop": start + 256,
            "num_documents": 2,
            "nats_per_token": 6.0 + start / 1024,
            "standard_error": 0.125,
        }
        for start in (0, 256)
    ]
    same = {"corpus": "held_out", "block_size": 32, "num_choices": 4, "seed": 0}
    return {**same, "needles": needles, "by_position": by_position, **others}


def write_all(folder: Path, trained: dict[str, Any]) -> list[str]:
    """The words of the command, for measurements and a run in `folder`."""
    words = ["--run", str(folder), "--output", str(folder / "table"), "--image", str(folder / "table.png")]
    for name in NAMES:
        (folder / f"{name}.json").write_text(json.dumps(trained if name == "trained" else measured((0.25, 0.5))))
        words += [f"--{name}", str(folder / f"{name}.json")]
    line = {"step": 3, "validation": True, "consumed_tokens": 99, "validation_elbo/32": 6.5}
    (folder / "metrics.jsonl").write_text(f"{json.dumps({'step': 3, 'loss': 1.0})}\n{json.dumps(line)}\n")
    return words


def test_needles_are_counted_and_averaged_over_depths_by_hand() -> None:
    (row,) = needle_rows({"plain": measured((0.25, 0.5)), "trained": measured((1.0, 0.75))})
    assert row["tokens"] == 512
    assert (row["right, no scaling"], row["right, after the run"]) == ("3 of 8", "7 of 8")
    assert (row["nats, no scaling"], row["gain, no scaling"]) == (25.0, 0.5)


def test_the_elbo_by_position_has_its_error() -> None:
    first, second = position_rows({"plain": measured((0, 0))})
    assert first == {"positions": "0 to 255", "no scaling": "6.000 ± 0.125"}
    assert second == {"positions": "256 to 511", "no scaling": "6.250 ± 0.125"}
    of_one = measured((0, 0))
    for cell in of_one["by_position"]:
        cell |= {"num_documents": 1, "standard_error": None}
    assert position_rows({"plain": of_one})[0]["no scaling"] == "6.000"


@pytest.mark.ranks  # the commit is asked of git
def test_table_and_picture_are_written(tmp_path: Path) -> None:
    assert main(write_all(tmp_path, measured((1.0, 0.75)))) == 0
    text = (tmp_path / "table.md").read_text()
    assert "| 3 | 99 | 6.500 |" in text and "7 of 8" in text
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_measurements_of_different_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seed \(0, 0, 1\) must be the same in all three"):
        main(write_all(tmp_path, measured((1.0, 0.75), seed=1)))
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize("name", ["needles", "by_position"])
@pytest.mark.parametrize("is_there", [True, False])
def test_measurements_of_other_cells_are_refused(name: str, is_there: bool, tmp_path: Path) -> None:
    trained = measured((1.0, 0.75))
    trained[name] = trained[name][1:] if is_there else []
    with pytest.raises(ValueError, match=rf"{name} of .*trained\.json must be there, and the same cells in all three"):
        main(write_all(tmp_path, trained))
    assert not (tmp_path / "table.md").exists()

from __future__ import annotations

from pathlib import Path

import pytest

from launch import record


def test_a_torn_line_does_not_take_the_next_event_along(tmp_path: Path) -> None:
    record.append_event(tmp_path, "start")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": 1, "ev')
    record.append_event(tmp_path, "end", how="vanished")
    record.append_event(tmp_path, "start")
    assert [event["event"] for event in record.events(tmp_path)] == ["start", "end", "start"]
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 4


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "chain.json").write_text("{")
    with pytest.raises(ValueError, match=r"chain\.json is damaged"):
        record.read_json(tmp_path / "chain.json")

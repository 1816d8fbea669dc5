"""What a run keeps of its earlier starts."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_dllm.run.files import append_line
from megatron_dllm.run.history import Change, changes_between, record_start, replace_records


def test_changes_are_named_with_both_values() -> None:
    old = {"run": {"seed": 1, "root": "a"}, "stages": {"w": {"n": 3}}, "sizes": [1], "empty": {}}
    new = {"run": {"seed": 2, "root": "a"}, "stages": {"v": {"n": None}}, "sizes": [1, 2], "empty": {}}
    assert [str(change) for change in changes_between(old, new)] == [
        "run.seed: 1 -> 2",
        "stages.v.n: (none) -> null",
        "sizes: [1] -> [1, 2]",
        "stages.w.n: 3 -> (none)",
    ]
    assert changes_between(old, old) == ()


def test_records_that_change_stay_under_a_number(tmp_path: Path) -> None:
    for config, code in (("a", "x"), ("a", "x"), ("b", "x"), ("b", "y")):
        replace_records(tmp_path, config, code)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {
        **{"config.yaml": "b", "git.txt": "y"},
        **{"config_0001.yaml": "a", "git_0001.txt": "x", "config_0002.yaml": "b", "git_0002.txt": "x"},
    }


def test_every_start_is_a_line_also_behind_one_that_was_cut_off(tmp_path: Path) -> None:
    record_start(tmp_path, (), step=0)
    with open(tmp_path / "starts.jsonl", "a") as file:
        file.write('{"time": "20')
    record_start(tmp_path, (Change("run.seed", 1, 2),), step=7)
    first, torn, last = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert json.loads(first)["changes"] == {} and torn == '{"time": "20'
    assert (json.loads(last)["step"], json.loads(last)["changes"]) == (7, {"run.seed": [1, 2]})


def test_a_line_is_added_to_what_is_there(tmp_path: Path) -> None:
    for line in ("é", "b"):
        append_line(tmp_path / "lines", line)
    assert (tmp_path / "lines").read_text(encoding="utf-8") == "é\nb\n"

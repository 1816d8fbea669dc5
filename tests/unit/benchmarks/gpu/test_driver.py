"""The acceptance run as a whole: what is kept of parts that end, fail or take too long."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import check_same_place, count_of, read_rows, run_part, same_columns
from benchmarks.gpu.parts import PARTS, Part


def _run(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--output", str(output), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    part = PARTS["facts"]
    assert read_rows(tmp_path, part) == []
    (tmp_path / "facts.jsonl").write_text('{"status": "ok"}\n{"status": "failed"}\n{"sta', encoding="utf-8")
    rows = read_rows(tmp_path, part)
    assert count_of(rows) == {"rows": 2, "ok": 1, "failed": 1, "skipped": 0}


def test_a_table_has_every_column_that_a_row_has() -> None:
    assert same_columns([{"a": 1}, {"b": 2, "a": 3}]) == [{"a": 1, "b": None}, {"a": 3, "b": 2}]


@pytest.mark.ranks
def test_a_part_that_takes_too_long_is_stopped_and_one_that_breaks_is_named(tmp_path: Path) -> None:
    args = argparse.Namespace(output=tmp_path, device="cpu", small=True)
    assert run_part(PARTS["facts"], args, 0.05)["end"].startswith("stopped after")
    assert run_part(Part("nosuch", 1.0, ""), args, 60.0)["end"] == "exit code 2"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--minutes", "0"], "--minutes (0) must be positive"),
        (["--only", "speed"], "invalid choice: 'speed'"),
        ([], "holds something already"),
        (["--resume"], "holds something already"),
        (["--output", __file__], "must be a folder"),
        (["--resume", "--output", "{real}"], "holds results of sizes real, and this run has tiny"),
    ],
)
def test_bad_words_are_refused(words: list[str], reason: str, tmp_path: Path) -> None:
    (tmp_path / "results.md").write_text("", encoding="utf-8")
    real = tmp_path / "real"
    real.mkdir()
    (real / "results.json").write_text(json.dumps({"about": {"sizes": "real"}}), encoding="utf-8")
    words = [word.format(real=real) for word in words]
    done = _run(tmp_path, *words)
    assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "found"), [("device", "NVIDIA H100"), ("sizes", "real")])
def test_results_of_another_device_or_of_other_sizes_are_not_gone_on_with(
    name: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser, ours = argparse.ArgumentParser(), {"device": "a CPU", "sizes": "tiny"}
    check_same_place(parser, tmp_path, ours)
    for written in (ours, {"device": ours["device"]}):  # an earlier version did not write the sizes
        (tmp_path / "results.json").write_text(json.dumps({"about": written}), encoding="utf-8")
        check_same_place(parser, tmp_path, ours)
    (tmp_path / "results.json").write_text(json.dumps({"about": ours | {name: found}}), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        check_same_place(parser, tmp_path, ours)
    assert ended.value.code == 2
    assert f"holds results of {name} {found}, and this run has {ours[name]}; name another" in capsys.readouterr().err


def test_damaged_results_are_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text('{"about": {"device"', encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        check_same_place(argparse.ArgumentParser(), tmp_path, {"device": "a CPU", "sizes": "tiny"})
    assert ended.value.code == 2
    assert "results.json is damaged (no JSON:" in (said := capsys.readouterr().err) and "name another folder." in said


@pytest.mark.ranks
def test_a_part_begins_anew_in_the_folder_of_its_earlier_start(tmp_path: Path) -> None:
    args = argparse.Namespace(output=tmp_path, device="cpu", small=True)
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "left").touch()
    (tmp_path / "facts.jsonl").write_text('{"status": "failed"}\n', encoding="utf-8")
    found = run_part(PARTS["facts"], args, 60.0)
    assert found["end"] == "finished" and found["failed"] == 0 and not list((tmp_path / "facts").iterdir())


@pytest.mark.slow
def test_parts_that_measure_speed_run_on_a_cpu_and_are_not_repeated(tmp_path: Path) -> None:
    names = ["facts", "attention", "step"]
    done = _run(tmp_path, "--only", *names, "--minutes", "5")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["part"] for row in found["Summary"]] == names
    assert all(row["end"] == "finished" for row in found["Summary"])
    steps = {row["what"]: row for row in found[PARTS["step"].title]}
    assert steps["step of 128 tokens"]["document tokens/s"] > 0 and any(name.startswith("waste 1") for name in steps)
    assert all(row["ms"] > 0 for row in found[PARTS["attention"].title])
    again = _run(tmp_path, "--only", *names, "--resume")
    assert again.returncode == 0 and "part " not in again.stdout

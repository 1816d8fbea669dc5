"""The command: one page, one table, one sentence for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dllm.report import main
from tests.unit.evaluation.made_results import write_harness
from tests.unit.reporting.folders import write_chain


def test_the_page_lies_in_the_folder_or_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "no such display")
    chain = write_chain(tmp_path / "full")
    assert main([str(chain)]) == main([str(chain), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == (chain / "report.html").read_text()
    said = capsys.readouterr().out
    assert "after decay" in said
    assert f"report: {chain / 'report.html'}" in said
    assert sorted(path.name for path in chain.iterdir()) == ["decay", "launch", "report.html", "stable", "warmup"]


def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        main([str(tmp_path)])
    assert (capsys.readouterr(), list(tmp_path.iterdir())) == (("", ""), [])


def test_a_place_that_cannot_be_written_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):  # not that the folder holds no run
        main([str(tmp_path), "--output", str(tmp_path / "file" / "page.html")])


def test_checkpoints_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, acc in (("sft", 0.5), ("cap", 0.25)):
        write_harness(
            tmp_path / name / "harness.json", acc=acc, settings={"num_fewshot": len(name) if acc < 0.5 else 5}
        )
    output = tmp_path / "new" / "table.json"
    words = ["compare", str(tmp_path / "sft"), f"CAP={tmp_path / 'cap'}", "--output", str(output)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "0.5 ± 0.1, 3 unsure" in said and "CAP" in said
    assert "not the same for all: num_fewshot: sft 5, CAP 3" in said
    assert [model["name"] for model in json.loads(output.read_text())["models"]] == ["sft", "CAP"]
    with pytest.raises(ValueError, match="exists; nothing is overwritten"):
        main(words)

"""Studies of decoding in a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dllm.evaluation.study_results import write_studies
from megatron_dllm.reporting.history import read_history
from megatron_dllm.reporting.study import read_study_files, study_section
from tests.unit.evaluation.test_study_results import point_of, study_of
from tests.unit.reporting.folders import write_chain


def test_the_front_of_every_model_in_the_order_of_the_runs(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "full")
    points = (point_of(15, 40), point_of(3, 60, "factor", 1.0))
    write_studies(chain / "study_late.json", [study_of("x/abroad", points[0]), study_of("full/decay", *points)])
    write_studies(chain / "study_early.json", [study_of("full/warmup", points[0])])
    studies = read_study_files(read_history(chain))
    assert [study.name for study in studies] == ["warmup", "decay", "abroad"]
    page = "".join(study_section(studies))
    expected = ["decay", "32", "threshold", "0.9", "0.750", "3.00", "2.00", "2.50", "3.00", "30"]
    assert "".join(f"<td>{cell}</td>" for cell in expected) in page
    assert "<td>factor</td>" not in page, "another point beats it"
    assert page.count("<img") == 1 and page.count("20 questions") == 1
    other = replace(studies[1], conditions="9 questions")
    assert "warmup: 20 questions; decay: 9 questions." in "".join(study_section([studies[0], other]))


def test_nothing_was_measured_or_the_file_is_another(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "full")
    assert study_section(read_study_files(read_history(chain))) == []
    (chain / "study.json").write_text("{}")
    with pytest.raises(ValueError, match=r"study\.json holds no study"):
        read_study_files(read_history(chain))

"""Tasks are found by name or file; what is missing is said in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import NOT_RUN

pytest.importorskip("lm_eval", reason=f"{NOT_RUN}no lm-evaluation-harness here; pip install -e '.[eval]'")

from megatron_dllm.evaluation.harness.tasks import (
    check_tasks,
    chosen_filter,
    greedy_tasks,
    leaves,
    load_tasks,
    writing_tasks,
)

QUESTIONS = [{"question": "a", "answer": "b"}]
FILTERS = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "flexible")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks, a group and a tag of them, and a task whose data set is elsewhere."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    common |= {"test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "tag": "tagged"}
    files = {
        "scores": common | {"task": "scores", "output_type": "loglikelihood", "metric_list": [{"metric": "acc"}]},
        "writes": common | {"task": "writes", "output_type": "generate_until"},
        "filters": common | {"task": "filters", "output_type": "generate_until", "filter_list": FILTERS},
        "both": {"group": "both", "task": ["scores", "writes"]},
        "far_group": {"group": "far_group", "task": ["far"]},
        "far": common | {"task": "far", "dataset_path": "somebody/far", "dataset_kwargs": {}},
        "lost": common | {"task": "lost", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lost.jsonl")}}},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def load(folder: Path, *names: str) -> list[str]:
    tasks = load_tasks(names, str(folder), include_defaults=False)
    return [task.task_name for task in leaves(tasks)]


def test_names_groups_tags_and_files_are_found(folder: Path) -> None:
    assert load(folder, "scores") == load(folder, f"{folder}/scores.yaml") == ["scores"]
    assert load(folder, "both") == ["scores", "writes"]
    assert len(load_tasks(["both"], str(folder), include_defaults=False)) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scoers", r"tasks \(scoers\) is no task of lm-evaluation-harness or .*; did you mean scores"),
        ("far", r"its data set somebody/far is neither in .* nor could it be fetched .*copy that machine's"),
        ("far_group", r"a data set of it is neither in .* nor could it be fetched .*somebody/far.*copy that machine's"),
        ("lost", r"tasks \(lost\) cannot be loaded: FileNotFoundError: .*lost.jsonl.*; correct the task's YAML file"),
    ],
)
def test_what_is_not_here_is_said(name: str, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, name)


def test_a_model_is_asked_what_it_can_do(folder: Path) -> None:
    tasks = load_tasks(["both"], str(folder), include_defaults=False)
    check_tasks(tasks, why_not_write=None, has_confirmed=False)
    assert greedy_tasks(tasks) == {"scores"} and writing_tasks(tasks) == ["scores", "writes"]
    with pytest.raises(ValueError, match=r"tasks \(scores\) has the model write text, and it is busy."):
        check_tasks(tasks, why_not_write="it is busy.", has_confirmed=False)
    leaves(tasks)[0].UNSAFE_CODE = True
    with pytest.raises(ValueError, match=r"tasks \(scores\) runs what the model writes"):
        check_tasks(tasks, why_not_write=None, has_confirmed=False)
    check_tasks(tasks, why_not_write=None, has_confirmed=True)


def test_the_filter_that_counts_is_the_first_or_the_one_that_is_named(folder: Path) -> None:
    several, plain = (load_tasks([name], str(folder), include_defaults=False)[0] for name in ("filters", "writes"))
    found = [chosen_filter(several, wanted) for wanted in (None, "strict", "flexible")]
    assert found == ["strict", "strict", "flexible"]
    assert chosen_filter(plain, None) == "none"
    with pytest.raises(ValueError, match=r"filter \(loose\) is none of task filters's \(strict, flexible\); name one"):
        chosen_filter(several, "loose")

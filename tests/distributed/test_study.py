"""Two ranks find what one rank finds in a study of decoding."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from megatron_dllm.evaluation.study_results import Study, read_studies
from tests.conftest import NOT_RUN
from tests.integration.test_answers import QUESTIONS, write_chats
from tests.integration.test_generate import CHAT_TEMPLATE, MODEL, save_run
from tests.integration.test_study import write_task
from tests.integration.tiny_chain import run_module

GRID = ["rules=[threshold,factor]", "thresholds=[0.6]", "factors=[1.0]", "max_new_tokens=24", "batch_size=2"]


def _study(*words: str) -> int:
    return run_module(["-m", "megatron_dllm.study", *GRID, *words])


def _prepare(folder: str) -> None:
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.parallel.groups import single_rank

    with single_rank(0):
        run = save_run(Path(folder) / "run", MODEL)
    (run / "tokenizer" / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _prepare_and_study(folder: str, *words: str) -> int:
    _prepare(folder)
    return _study(*words)


def _without_times(path: Path) -> list[Study]:
    """What was found, but for what the number of ranks and the machine decide."""
    return [
        replace(study, conditions="", points=[replace(point, seconds=1.0) for point in study.points])
        for study in read_studies(path)
    ]


def test_replicas_that_share_experts_find_what_one_rank_finds(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", ["x y"] * len(QUESTIONS))
    words = [f"checkpoint={tmp_path / 'run'}", f"chats_file={chats}"]
    expected, found = tmp_path / "expected.json", tmp_path / "found.json"
    assert run_ranks(_prepare_and_study, 1, str(tmp_path), *words, f"output={expected}", timeout_s=300.0) == [0]
    two = run_ranks(_study, 2, *words, f"output={found}", "expert_model_parallel_size=2", timeout_s=300.0)
    assert two == [0, 0]
    for mine, theirs in zip(_without_times(found), _without_times(expected), strict=True):
        assert mine.points == theirs.points and mine.confidence == theirs.confidence


def _offline_study(cache: str, *words: str) -> int:
    os.environ.update(HF_HOME=cache, HF_HUB_OFFLINE="1")
    return _study(*words)


def test_two_ranks_ask_tasks_of_the_harness_as_one_does(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=f"{NOT_RUN}no lm-evaluation-harness here; pip install -e '.[eval]'")
    assert run_ranks(_prepare, 1, str(tmp_path), timeout_s=300.0) == [None]
    task = write_task(tmp_path, "toy_writing", [{"question": text, "answer": "x"} for text in QUESTIONS])
    words = [f"checkpoint={tmp_path / 'run'}", f"tasks=[{task}]"]
    studies = []
    for num_ranks in (1, 2):
        output = tmp_path / f"{num_ranks}.json"
        given = (str(tmp_path / "cache"), *words, f"output={output}")
        assert run_ranks(_offline_study, num_ranks, *given, timeout_s=300.0) == [0] * num_ranks
        studies += _without_times(output)
    assert studies[0].points == studies[1].points
    assert studies[0].points[0].tasks["toy_writing"].num_questions == len(QUESTIONS)

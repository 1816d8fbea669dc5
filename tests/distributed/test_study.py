"""Two ranks find what one rank finds in a study of decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.ranks import run_ranks
from megatron_dllm.evaluation.study_results import Study, read_studies
from tests.integration.test_answers import QUESTIONS, write_chats
from tests.integration.test_generate import CHAT_TEMPLATE, MODEL, save_run
from tests.integration.tiny_chain import run_module

GRID = ["rules=[threshold,factor]", "thresholds=[0.6]", "factors=[1.0]", "max_new_tokens=24", "batch_size=2"]


def _study(*words: str) -> int:
    return run_module(["-m", "megatron_dllm.study", *GRID, *words])


def _prepare_and_study(folder: str, *words: str) -> int:
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.parallel.groups import single_rank

    with single_rank(0):
        run = save_run(Path(folder) / "run", MODEL)
    (run / "tokenizer" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
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

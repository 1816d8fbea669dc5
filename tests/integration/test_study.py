"""A study of a small model from the command line: its points are what generate gives, its files are whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_dllm.config import GenerateConfig
from megatron_dllm.evaluation.study_results import read_studies
from megatron_dllm.generate import generate
from megatron_dllm.study import main, parse_arguments
from tests.integration.test_answers import QUESTIONS, write_chats
from tests.integration.test_generate import CHAT_TEMPLATE, MODEL, save_run


@pytest.fixture(scope="module")
def run(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = save_run(tmp_path_factory.mktemp("study") / "run", MODEL)
    (run / "tokenizer" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return run


def test_points_are_what_generate_gives(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", ["x"] * len(QUESTIONS))
    settings = dict(checkpoint=str(run), chats_file=str(chats), max_new_tokens=30)
    known = [result.text.strip() or "x" for result in generate(GenerateConfig(threshold=0.6, **settings))]
    write_chats(chats, known)
    output = tmp_path / "new" / "study.json"
    words = [f"checkpoint={run}", f"checkpoint={run / 'checkpoints'}", f"chats_file={chats}", f"output={output}"]
    grid = [
        "block_sizes=[8,4]",
        "rules=[threshold,factor]",
        "thresholds=[0.6,1.0]",
        "factors=[1.0]",
        "max_new_tokens=30",
    ]
    assert main([*words, *grid, "batch_size=4"]) == 0
    first, second = read_studies(output)
    assert [study.name for study in (first, second)] == ["run", "checkpoints"]
    assert [(point.block_size, point.rule, point.value) for point in first.points] == [
        (size, *setting) for size in (8, 4) for setting in (("threshold", 0.6), ("threshold", 1.0), ("factor", 1.0))
    ]
    assert [point.tasks for point in second.points] == [point.tasks for point in first.points]
    assert first.points[0].accuracy > 0.5 > first.points[3].accuracy, "what was said at block 8 and 0.6 is right"
    for point in first.points:
        options = {"threshold": point.value} if point.rule == "threshold" else {"factor": point.value}
        alone = generate(GenerateConfig(block_size=point.block_size, rule=point.rule, **options, **settings))
        generations = [result.generation for result in alone]
        assert point.all_tasks.num_tokens == sum(len(one.generated_ids) for one in generations)
        assert point.all_tasks.num_forwards == sum(one.num_denoising_forwards for one in generations)
        assert point.num_commits == sum(one.num_commit_forwards for one in generations)
        assert (point.expected_tokens_per_forward is None) == (point.rule == "factor")
    assert {row.threshold for row in first.confidence} == {0.6, 1.0}
    assert all(row.num_sure == 0 for row in first.confidence if row.threshold == 1.0)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "factor" in printed and "*" in printed and "with commits" in printed
    assert f"{run}: step_0000005, 6 questions of {chats}, at most 30 tokens, batch 4, cpu, fp32, 1 ranks" in printed
    for name in ("study.json", "study.png"):
        with pytest.raises(ValueError, match=rf"{name}\) exists; nothing is overwritten"):
            main([*words, *grid])
        (output.parent / name).unlink()


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    right = f"checkpoint={run}"
    for words, message in (
        ([], "checkpoint (not given) is required"),
        (["checkpoint=/nope"], "checkpoint (/nope) is not a folder"),
        ([right, "tasks=[sort,chess]"], "tasks (chess) are not known; use some of sort, reverse"),
        ([right, "chats_file=/nope"], "chats_file (/nope) is not a file"),
        ([right, "thresholds=[2.0]"], "threshold (2.0) must lie in (0, 1]"),
        ([right, "threshold=[0.9]"], "threshold is not a key of the configuration; did you mean thresholds"),
        ([right, f"output={tmp_path}"], "is a folder; name a file"),
        ([right, "output=a", "output=b"], "output (b) is given twice"),
        ([right, "tensor_model_parallel_size=2"], "must divide the number of ranks (1)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            main(words)
    assert parse_arguments([right, "tasks=[sort]"]).tasks == ["sort"]

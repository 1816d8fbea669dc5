"""A study of a small model from the command line: its points are what generate gives, its files are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_dllm.config import GenerateConfig
from megatron_dllm.evaluation.answer_scores import TaskScore
from megatron_dllm.evaluation.study_results import read_studies
from megatron_dllm.generate import generate
from megatron_dllm.study import main, parse_arguments
from tests.conftest import NOT_RUN
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


def write_task(folder: Path, name: str, questions: list[dict[str, str]], **changes: object) -> Path:
    """A task of lm-evaluation-harness with questions of its own."""
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, questions)))
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["cc"], "max_gen_toks": 20},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content | changes))
    return folder / f"{name}.yaml"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets of the test alone."""
    pytest.importorskip("lm_eval", reason=f"{NOT_RUN}no lm-evaluation-harness here; pip install -e '.[eval]'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_tasks_of_the_harness_are_decoded_in_every_way(run: Path, tmp_path: Path, cache: None) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(QUESTIONS))
    settings = dict(checkpoint=str(run), prompts_file=str(tmp_path / "prompts.txt"), max_new_tokens=20, stop=["cc"])
    alone = generate(GenerateConfig(threshold=0.6, **settings))
    known = [result.text if number < 3 else "no such answer" for number, result in enumerate(alone)]
    questions = [{"question": text, "answer": answer} for text, answer in zip(QUESTIONS, known, strict=True)]
    yaml_file, output = write_task(tmp_path, "toy_writing", questions), tmp_path / "study.json"
    words = [f"checkpoint={run}", f"tasks=[{yaml_file}]", "thresholds=[0.6,1.0]", f"output={output}", "batch_size=3"]
    assert main(words) == 0
    (study,) = read_studies(output)
    assert [list(point.tasks) for point in study.points] == [["toy_writing"]] * 2 and not study.confidence
    for point in study.points:
        found = generate(GenerateConfig(threshold=point.value, **settings))
        generations = [result.generation for result in found]
        assert point.tasks["toy_writing"] == TaskScore(
            num_questions=len(QUESTIONS),
            num_right=sum(result.text == answer for result, answer in zip(found, known, strict=True)),
            num_tokens=sum(len(one.generated_ids) for one in generations),
            num_forwards=sum(one.num_denoising_forwards for one in generations),
        )
        assert point.num_commits == sum(one.num_commit_forwards for one in generations)
        assert point.expected_tokens_per_forward is None and point.seconds > 0
    assert study.points[0].tasks["toy_writing"].num_right >= 3
    assert f"60 each of {yaml_file} as texts behind as many examples as they say" in study.conditions


def test_tasks_that_no_study_can_count_are_refused(run: Path, tmp_path: Path, cache: None) -> None:
    questions = [{"question": "the cat", "answer": "sat"}]
    choices = write_task(
        tmp_path, "choices", questions, output_type="loglikelihood", metric_list=[{"metric": "perplexity"}]
    )
    overlap = write_task(tmp_path, "overlap", questions, metric_list=[{"metric": "chrf"}])
    words = [f"checkpoint={run}", "thresholds=[0.6]", "max_new_tokens=8"]
    with pytest.raises(ValueError, match=r"tasks \(choices\) scores given texts, which no way of decoding changes"):
        main([*words, f"tasks=[{choices}]"])
    with pytest.raises(ValueError, match=r"tasks \(overlap\) has no metric that says right or wrong \(chrf\)"):
        main([*words, f"tasks=[{overlap}]"])


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    right = f"checkpoint={run}"
    for words, message in (
        ([], "checkpoint (not given) is required"),
        (["checkpoint=/nope"], "checkpoint (/nope) is not a folder"),
        ([right, "tasks=[sort,chess.yaml]"], "tasks (chess.yaml) is not a file"),
        ([right, "tasks=[sort,chess.yaml]"], "Tasks of this program are sort, reverse"),
        ([right, "num_fewshot=-1"], "num_fewshot (-1) must not be negative"),
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

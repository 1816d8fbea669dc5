"""The answers of a checkpoint, measured from the command line: the same as when each question is asked alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dllm.config import GenerateConfig
from megatron_dllm.evaluation.answer_pairs import main as make_pairs
from megatron_dllm.evaluation.answer_scores import TaskScore, read_answer_scores
from megatron_dllm.evaluation.answers import main
from megatron_dllm.generate import generate
from tests.integration.test_generate import CHAT_TEMPLATE, MODEL, save_run

QUESTIONS = ["the cat", "who", "once upon", "there was a dog", "a", "on the mat"]


@pytest.fixture(scope="module")
def run(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = save_run(tmp_path_factory.mktemp("answers") / "run", MODEL)
    (run / "tokenizer" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return run


def write_chats(path: Path, answers: list[str]) -> Path:
    """The questions with these answers, in two tasks by turns."""
    lines = []
    for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages, "task": f"task {number % 2}"}))
    path.write_text("\n".join(lines))
    return path


def test_scores_are_those_of_every_question_asked_alone(run: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", ["x"] * len(QUESTIONS))
    config = GenerateConfig(checkpoint=str(run), chats_file=str(chats), threshold=0.6, max_new_tokens=30)
    alone = generate(config)
    # What the model says to the first four questions is called right, unless it says nothing.
    known = [result.text.strip() or "x" if number < 4 else "x" for number, result in enumerate(alone)]
    is_right = [answer == result.text.strip() for answer, result in zip(known, alone, strict=True)]
    assert 0 < sum(is_right) < len(QUESTIONS)
    chats = write_chats(chats, known)
    output = tmp_path / "answers.json"
    words = ["--checkpoint", str(run), "--chats", str(chats), "--output", str(output), "--max_new_tokens", "30"]
    assert main([*words, "--thresholds", "0.6", "1.0", "--batch_size", "2", "--num_shown", "1"]) == 0
    scores = read_answer_scores(output)
    expected = {
        f"task {odd}": TaskScore(
            num_questions=3,
            num_right=sum(is_right[odd::2]),
            num_tokens=sum(len(result.generation.generated_ids) for result in alone[odd::2]),
            num_forwards=sum(result.generation.num_denoising_forwards for result in alone[odd::2]),
        )
        for odd in (0, 1)
    }
    assert scores.thresholds[0].tasks == expected
    assert scores.thresholds[1].all_tasks.num_forwards > scores.thresholds[0].all_tasks.num_forwards
    assert [answer.question for answer in scores.shown] == QUESTIONS[:2]
    assert all(len(answer.token_texts) == len(answer.accepted_in_pass) for answer in scores.shown)
    with pytest.raises(ValueError, match="exists; nothing is overwritten"):
        main(words)


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    chats = str(write_chats(tmp_path / "chats.jsonl", ["x"] * len(QUESTIONS)))
    output = str(tmp_path / "new.json")
    for words, message in (
        (["--checkpoint", "/nope"], "checkpoint (/nope) is not a folder"),
        (["--chats", "/nope"], "chats (/nope) is not a file"),
        (["--thresholds", "1.5"], "threshold (1.5) must lie in (0, 1]"),
        (["--limit", "0"], "limit (0) must be positive"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            main(["--checkpoint", str(run), "--chats", chats, "--output", output, *words])
    assert not Path(output).exists()


def test_pairs_of_sampled_answers_come_from_the_command_line(run: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", ["x"] * len(QUESTIONS))
    config = GenerateConfig(checkpoint=str(run), chats_file=str(chats), threshold=0.9, max_new_tokens=12)
    sampled = [generate(replace(config, temperature=1.0, seed=5 + 6 * number)) for number in (0, 1)]
    # What is said to the third question in the second round is called right; no other answer is.
    known = sampled[1][2].text.strip()
    assert known and known != sampled[0][2].text.strip() and sampled[0][2].text.strip()
    chats = write_chats(chats, ["x", "x", known, "x", "x", "x"])
    output = tmp_path / "pairs.jsonl"
    words = ["--checkpoint", str(run), "--chats", str(chats), "--output", str(output), "--max_new_tokens", "12"]
    assert make_pairs([*words, "--num_samples", "2", "--seed", "5", "--batch_size", "4"]) == 0
    (pair,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert pair == {
        "prompt": [{"role": "user", "content": QUESTIONS[2]}],
        "chosen": sampled[1][2].text,
        "rejected": sampled[0][2].text,
        "task": "task 0",
    }
    with pytest.raises(ValueError, match="exists; nothing is overwritten"):
        make_pairs(words)
    with pytest.raises(ValueError, match=r"temperature \(0\.0\) must be positive"):
        make_pairs([*words, "--temperature", "0"])

"""The commands of the pages in docs/ run as they stand there, on what the small chain has made.

README and the guide have tests of their own; commands that train or launch are composed by tests/unit/test_docs.py.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from tests.house.mentions import ROOT, command_lines

# By page: how many of its commands run here.
PAGES = {"chats.md": 6, "data.md": 2, "decoding.md": 3, "post_training.md": 2, "preferences.md": 3, "runs.md": 1}
PROGRAMS = (
    *("megatron_dllm.data.tokenize", "megatron_dllm.data.verify", "megatron_dllm.generate", "megatron_dllm.evaluate"),
    *("megatron_dllm.evaluation.answers", "megatron_dllm.evaluation.tasks.chats"),
)
# What makes a command shorter, after its own words.
SHORTER = {
    "megatron_dllm.generate": ["max_new_tokens=8"],
    "megatron_dllm.evaluate": ["evaluation.num_tokens=300"],
    "megatron_dllm.needle": ["depths=[0]", "num_needles=1", "num_choices=2", "num_documents=1"],
    "megatron_dllm.evaluation.tasks.chats": ["--num_train", "20", "--num_held_out", "2"],
    "megatron_dllm.evaluation.answers": ["--limit", "1", "--thresholds", "0.9", "--max_new_tokens", "8"],
}
# What a page names, and where the chain has made it.
NAMED = {
    "TOKENIZER": "corpus/tokenizer",
    "DIR": "cap",
    "runs/demo/chat_hf": "chat_hf",
    "runs/demo/corpus/tokenizer": "corpus/tokenizer",
}
PAIRS = [{"prompt": f"sort: {n} 1", "chosen": f"1 {n}", "rejected": f"{n} 1"} for n in range(2, 40)]


def commands_of(page: str) -> list[tuple[str, list[str]]]:
    """Program and words of the page's commands that one process can run; scores are written by ranks, with a test."""
    lines = command_lines((ROOT / "docs" / page).read_text())
    return [
        (program, words)
        for program, words in lines
        if program in PROGRAMS and not any("parallel_size" in word or word.startswith("scores=") for word in words)
    ]


def lay_out(demo: Path, folder: Path) -> None:
    """What the commands name, at the names that they use."""
    chats = (demo / "chats" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "chats.jsonl").write_text("".join(chats[:8]))
    for name in ("pairs.jsonl", "own.jsonl"):
        (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (folder / "prompts.jsonl").write_text('{"prompt": "def main("}\n{"prompt": "import os"}\n')
    (folder / "TEXT").mkdir()
    shutil.copy(demo / "corpus" / "validation.jsonl", folder / "TEXT")
    (folder / "data").mkdir()
    for path in (demo / "corpus").glob("validation.*"):
        shutil.copy(path, folder / "data" / f"code{path.suffix}")
        shutil.copy(path, folder / f"PREFIX{path.suffix}")
    for target, source in NAMED.items():
        shutil.copytree(demo / source, folder / target)


def run_all(folder: Path, commands: list[tuple[str, list[str]]]) -> list[tuple[str, list[str], int]]:
    """Run commands one after the other in a folder; each with its exit code."""
    os.chdir(folder)
    ended = []
    for program, words in commands:
        sys.argv = [program, *words, *SHORTER.get(program, [])]
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        ended.append((program, words, code))
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, demo: Path, tmp_path: Path) -> None:
    lay_out(demo, tmp_path)
    commands = commands_of(page)
    assert len(commands) == PAGES[page], [program for program, _ in commands]
    (ended,) = run_ranks(run_all, 1, tmp_path, commands, timeout_s=500.0)
    assert [code for _, _, code in ended] == [0] * len(commands), ended

"""README's commands for a single stage run as they stand there, on what the small chain has made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from tests.house.mentions import ROOT, command_lines
from tests.integration.test_docs_commands import PAIRS, run_all

# Composed by tests/unit/test_docs.py: they need GPUs or SLURM. The harness asks a server for its questions; it, the
# planner and the examples have tests of their own.
ELSEWHERE = (
    *("megatron_dllm.train", "launch/submit.py", "megatron_dllm.harness", "megatron_dllm.plan"),
    *("examples.packed_row", "examples.decode_export", "examples.own_text"),
)
# This machine has fewer cores, and the small chain fewer checkpoints.
SMALLER = {"16": "1", "5": "2"}


def _lay_out(demo: Path, folder: Path) -> None:
    """What the commands name, at the names that they use; outputs of one are inputs of another."""
    (folder / "corpus").mkdir()
    shutil.copy(demo / "corpus" / "train.jsonl", folder / "corpus")
    (folder / "data").mkdir()
    for path in (demo / "corpus").glob("validation.*"):
        shutil.copy(path, folder / "data")
    shutil.copy(demo / "chats" / "train.jsonl", folder / "chats.jsonl")
    shutil.copy(demo / "chats" / "held_out.jsonl", folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    copies = {"corpus/tokenizer": "TOKENIZER", "base_hf": "Ling-mini-2.0", "convert": "runs/llada2_mini"}
    for source, target in {**copies, "cap": "DIR", "merged": "A", "hf": "B"}.items():
        shutil.copytree(demo / source, folder / target)


@pytest.mark.slow
def test_the_commands_of_the_readme_run(demo: Path, tmp_path: Path) -> None:
    _lay_out(demo, tmp_path)
    commands = [
        (program, [SMALLER.get(word, word) for word in words])
        for program, words in command_lines((ROOT / "README.md").read_text())
        if program not in ELSEWHERE and not program.startswith("benchmarks.")
    ]
    assert [program.rsplit(".", 1)[-1] for program, _ in commands] == [
        *("tokenize", "hf_to_mcore", "evaluate", "merge_topk", "mcore_to_hf", "generate", "needle"),
        *("tokenize", "tokenize", "generate", "answers", "inspect", "compare"),
    ]
    (ended,) = run_ranks(run_all, 1, tmp_path, commands, timeout_s=500.0)
    assert [code for *_, code in ended] == [0] * len(commands), ended
    assert all((tmp_path / "data" / f"{name}.spans").is_file() for name in ("chats", "pairs"))
    assert (tmp_path / "answers.json").is_file()
    assert (tmp_path / "llada2_mini_hf" / "config.json").is_file() and (tmp_path / "data" / "train.idx").is_file()

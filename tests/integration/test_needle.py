"""The command that tests long contexts, on an export of the tiny chain."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks import run_ranks
from tests.integration.tiny_chain import run_module


def _needle(words: list[str]) -> int:
    return run_module(["-m", "megatron_dllm.needle", *words])


def needle(demo: Path, output: Path, *words: str, num_ranks: int = 1) -> dict[str, Any]:
    given = [f"checkpoint={demo / 'hf'}", f"data.validation={demo / 'corpus' / 'validation'}", f"output={output}"]
    sizes = ["num_choices=2", "likelihood.num_views=1", "num_documents=2"]
    codes = run_ranks(_needle, num_ranks, [*given, *sizes, *words], timeout_s=300.0)
    assert codes == [0] * num_ranks
    return json.loads(output.read_text())


def test_needles_and_positions_are_measured_alike_on_any_layout(demo: Path, tmp_path: Path) -> None:
    words = ("num_needles=1", "lengths=[96,256]", "depths=[0,1]", "stretch=256")
    one = needle(demo, tmp_path / "one.json", *words)
    assert [(cell["length"], cell["depth"]) for cell in one["needles"]] == [(96, 0), (96, 1), (256, 0), (256, 1)]
    assert [(item["start"], item["stop"]) for item in one["by_position"]] == [(0, 256), (256, 512)]
    assert one["context_length"] == 512 and one["rotary_scaling"] is None and one["block_size"] == "32"
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    two = needle(demo, tmp_path / "two.json", *words, "parallel.context_parallel_size=2", num_ranks=2)
    for name in ("needles", "by_position"):
        for ours, expected in zip(two[name], one[name], strict=True):
            assert ours == pytest.approx(expected, rel=1e-4)


def test_a_context_beyond_the_training_s_takes_a_scaling(demo: Path, tmp_path: Path) -> None:
    scaling = "model.rotary_scaling={kind: yarn, factor: 2, original_max_position_embeddings: 512}"
    words = ("num_needles=0", "schedule.context_length=1024", "stretch=512")
    plain = needle(demo, tmp_path / "plain.json", *words)
    stretched = needle(demo, tmp_path / "stretched.json", *words, scaling, "checkpoint.change_rotary=true")
    assert stretched["rotary_scaling"]["factor"] == 2.0 and stretched["needles"] == []
    costs = [[item["nats_per_token"] for item in found["by_position"]] for found in (plain, stretched)]
    assert len(costs[0]) == 2 and costs[0] != costs[1]


def _refusals(*commands: list[str]) -> list[tuple[int, str]]:
    """Exit code and what was printed of each command, in a rank of the test session."""
    found = []
    for words in commands:
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            found.append((_needle(words), printed.getvalue()))
    return found


def test_what_would_be_lost_is_refused(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"another's")
    given = [f"checkpoint={demo / 'hf'}", f"data.validation={demo / 'corpus' / 'validation'}"]
    commands = [*given, f"output={tmp_path / 'one.json'}"], [*given, "block_sizes=[4,8]"]
    ((exists, sizes),) = run_ranks(_refusals, 1, *commands, timeout_s=300.0)
    assert exists[0] == 2 and f"output ({tmp_path / 'one.png'}) exists" in exists[1]
    assert sizes[0] == 2 and "block_sizes ([4,8]) are for evaluate" in sizes[1]
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]

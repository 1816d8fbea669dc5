"""The command that compares bands: the same table on every number of ranks, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from tests.integration.tiny_chain import run_module

WORDS = ["block_sizes=[32,4]", "evaluation.num_tokens=2400", "draws=2"]


def run_command(words: list[str]) -> tuple[int, str]:
    """Exit code and what was printed, in a rank of the test session."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = run_module(["-m", "megatron_dllm.band", *words])
    return code, printed.getvalue()


def compare(demo: Path, name: str, *words: str, num_ranks: int = 1) -> list[tuple[int, str]]:
    given = [f"checkpoint={demo / name}", f"data.validation={demo / 'corpus' / 'validation'}", *WORDS, *words]
    return run_ranks(run_command, num_ranks, given, timeout_s=300.0)


def test_a_table_for_every_block_size_on_any_layout(demo: Path, tmp_path: Path) -> None:
    ((code, printed),) = compare(demo, "merged", f"output={tmp_path / 'one.json'}")
    assert code == 0, printed
    assert "block size 32" in printed and "block size 4" in printed and "Nothing was changed" in printed
    tables = json.loads((tmp_path / "one.json").read_text())
    whole = {name: next(b for b in bands if b["t_max"] - b["t_min"] > 0.99) for name, bands in tables.items()}
    for name, bands in tables.items():
        spreads = [band["relative_variance"] for band in bands]
        assert len(bands) == 36 and spreads == sorted(spreads) and spreads[0] < whole[name]["relative_variance"]
    assert whole["4"]["num_blocks"] > 6 * whole["32"]["num_blocks"]
    assert 0.8 < whole["4"]["mean"] * 8 / whole["32"]["mean"] < 1.3  # nats of 4 tokens, and of 32
    split = ["parallel.context_parallel_size=2", f"output={tmp_path / 'new' / 'two.json'}"]
    first, second = compare(demo, "merged", *split, num_ranks=2)
    assert (first[0], second) == (0, (0, "")), first[1]
    for name, bands in json.loads((tmp_path / "new" / "two.json").read_text()).items():
        for band, expected in zip(bands, tables[name], strict=True):
            assert band == pytest.approx(expected, rel=1e-4)


def test_what_has_no_levels_is_refused(demo: Path) -> None:
    ((code, printed),) = compare(demo, "start")
    assert code == 2 and "is autoregressive and knows no noise levels" in printed and "Traceback" not in printed
    ((code, printed),) = compare(demo, "merged", "evaluation.with_ar=true")
    assert code == 2 and "evaluation.with_ar (true)" in printed and "autoregressive" not in printed
    ((code, printed),) = compare(demo, "merged", "draws=0")
    assert code == 2 and "draws (0) must be positive" in printed

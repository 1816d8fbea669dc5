"""The command that measures a checkpoint: what lies in a run, in a merge and in an export are measured alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from megatron_dllm.checkpoint.validation import read_validation, read_validation_file
from tests.integration.tiny_chain import VALIDATION_TOKENS, run_module

SIZES = "evaluation.block_sizes=[32,4,512]"


def run_command(words: list[str]) -> tuple[int, str]:
    """Exit code and what was printed, in a rank of the test session."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = run_module(["-m", "megatron_dllm.evaluate", *words])
    return code, printed.getvalue()


def evaluate(demo: Path, name: str, *words: str, num_ranks: int = 1) -> list[tuple[int, str]]:
    given = [f"checkpoint.load={demo / name}", f"data.validation={demo / 'corpus' / 'validation'}", *words]
    return run_ranks(run_command, num_ranks, given, timeout_s=300.0)


def test_an_export_measures_as_the_checkpoint_it_was_made_from(demo: Path, tmp_path: Path) -> None:
    expected = read_validation(demo / "merged")
    assert expected is not None and expected.conditions is not None
    output = tmp_path / "new" / "hf.json"
    words = [SIZES, f"evaluation.num_tokens={VALIDATION_TOKENS}", f"output={output}"]
    ((code, printed),) = evaluate(demo, "hf", *words)
    assert code == 0, printed
    found = read_validation_file(output)
    # The chain measures on two ranks: other sums.
    assert found.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-6)
    assert (found.conditions, found.target_block_size) == (expected.conditions, 32)
    assert f"written to {output}" in printed and f"{expected.conditions.num_tokens:,} document tokens" in printed
    assert f"{expected.nats_per_token['4']:.4f}" in printed and "context length 512" in printed
    assert not (demo / "hf" / "validation.json").exists()


def test_two_ranks_measure_an_export_in_another_layout(demo: Path, tmp_path: Path) -> None:
    expected = read_validation(demo / "merged")
    assert expected is not None
    output = tmp_path / "hf.json"
    words = [
        *("evaluation.block_sizes=[32]", f"evaluation.num_tokens={VALIDATION_TOKENS}"),
        *("parallel.expert_model_parallel_size=2", "parallel.tensor_model_parallel_size=2"),
        *("parallel.sequence_parallel=true", "parallel.expert_tensor_parallel_size=1", f"output={output}"),
    ]
    first, second = evaluate(demo, "hf", *words, num_ranks=2)
    assert (first[0], second) == (0, (0, "")), first[1]
    found = read_validation_file(output)
    assert found.nats_per_token["32"] == pytest.approx(expected.nats_per_token["32"], rel=1e-6)
    assert found.conditions == expected.conditions


def test_an_earlier_result_stays_unless_asked(demo: Path, tmp_path: Path) -> None:
    before = (demo / "merged" / "validation.json").read_text()
    ((code, printed),) = evaluate(demo, "merged")
    assert code == 2 and "Traceback" not in printed
    assert "validation.json exists (nats per token" in printed and "overwrite=true" in printed
    assert (demo / "merged" / "validation.json").read_text() == before
    output = tmp_path / "ar.json"
    output.write_text("{}")
    for words, expected in (([], 2), (["overwrite=true"], 0)):
        ((code, printed),) = evaluate(demo, "base", "evaluation.num_tokens=300", f"output={output}", *words)
        assert code == expected, printed
    assert set(json.loads(output.read_text())["elbo"]) == {"ar"} and "exact NLL" in printed


def test_a_place_below_a_file_is_found_before_measuring(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ((code, printed),) = evaluate(demo, "base", f"output={tmp_path}/file/result.json")
    assert code == 2 and "cannot be written" in printed and "Traceback" not in printed

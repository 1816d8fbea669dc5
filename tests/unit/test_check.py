"""`megatron_dllm.check --paths`: the table of what runs."""

from __future__ import annotations

import pytest

from megatron_dllm.check import main, show_paths

pytestmark = pytest.mark.usefixtures("one_rank")


def _rows(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines()}


def test_the_table_says_what_runs_here_and_that_it_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    show_paths(["experiment=tiny_convert"], "here")
    text = capsys.readouterr().out
    rows = _rows(text)
    assert "shared_prefix" in rows["attention"] and "fastest on CPU" in rows["attention"]
    assert text.splitlines()[-1] == "compared with the plain computation, and equal: experts"


def test_the_table_of_a_gpu_says_what_would_be_faster(capsys: pytest.CaptureFixture[str]) -> None:
    show_paths(["experiment=llada2_mini", "parallel.precision=bf16"], "cuda")
    rows = _rows(capsys.readouterr().out)
    assert 'TransformerEngine\'s: pip install "megatron_dllm[gpu]"' in rows["linear"]
    assert "flex" in rows["attention"] and "nccl" in rows["collectives"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=tiny_convert", "optimizer.offload=disk"], r"optimizer.offload \(disk\)"),
        (["experiment=tiny_convert", "optimzer.offload=cpu"], "did you mean optimizer.offload"),
        (["experiment=tiny_convert", "training.attention_backend=flex"], "no backward on the CPU"),
    ],
)
def test_what_cannot_run_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        show_paths(words, "here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/one", "--paths", "experiment=tiny_convert"], "runs/one are folders of runs; ask for one at a time"),
        (["runs/one", "--on", "cuda"], r"--on \(cuda\) has no effect without --paths"),
    ],
)
def test_what_would_be_passed_over_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(words)

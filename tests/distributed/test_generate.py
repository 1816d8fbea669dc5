"""Every layout of the ranks decodes the texts that one rank decodes."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks import run_ranks
from tests.integration.test_generate import MODEL, save_run
from tests.integration.tiny_chain import run_module

WORDS = ["threshold=0.5", "max_new_tokens=24", "block_size=8", "batch_size=3"]
PROMPTS = ["the cat", "a", "once upon a time there was.", "the cat sat", "the cat sat there", "who", "b.", "c d e f g"]


def _prepare(folder: str) -> None:
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.parallel.groups import single_rank

    with single_rank(0):
        save_run(Path(folder) / "run", replace(MODEL, num_layers=4))
    (Path(folder) / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


def _command(*words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `python -m megatron_dllm.generate`."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = run_module(["-m", "megatron_dllm.generate", *words])
    return code, output.getvalue(), errors.getvalue()


def _texts(folder: Path, name: str, num_ranks: int, *words: str) -> list[dict[str, Any]]:
    """What the ranks have written, without the times."""
    places = [f"checkpoint={folder / 'run'}", f"prompts_file={folder / 'prompts.txt'}", f"output={folder / name}"]
    found = run_ranks(_command, num_ranks, *WORDS, *places, *words, timeout_s=300.0)
    for rank, (code, output, errors) in enumerate(found):
        assert code == 0, errors
        assert (output == "") == (rank > 0), "the first rank alone prints"
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Folder with a run, and what one rank makes of its prompts."""
    folder = tmp_path_factory.mktemp("generate")
    run_ranks(_prepare, 1, str(folder))
    expected = _texts(folder, "expected.jsonl", 1)
    assert [line["prompt"] for line in expected] == PROMPTS
    assert len({line["text"] for line in expected}) > len(PROMPTS) // 2
    return folder, expected


@pytest.mark.parametrize(
    "layout", ["tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"]
)
def test_two_ranks_decode_the_texts_of_one(layout: str, start: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, expected = start
    assert _texts(folder, f"{layout}.jsonl", 2, f"{layout}=2") == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "tensor_model_parallel_size=3",
            "tensor x pipeline x context (3 x 1 x 1 = 3) must divide the number of ranks (2)",
        ),
        ("output=/dev/null", "output (/dev/null) exists; nothing is overwritten"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(
    word: str, message: str, start: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, _ = start
    found = run_ranks(_command, 2, f"checkpoint={folder / 'run'}", "prompt=a", word, timeout_s=300.0)
    assert [(code, output) for code, output, _ in found] == [(2, "")] * 2
    assert f"error: {message}" in found[0][2]
    assert "Traceback" not in found[0][2] + found[1][2]

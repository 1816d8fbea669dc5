"""The command that compares every byte of corpora with what was recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dllm.data.sums_file import write_sums
from megatron_dllm.data.verify import main
from tests.unit.data.test_sums_file import DOCUMENTS, flip


def test_a_whole_corpus_and_a_damaged_one(write_corpus: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    prefixes = [write_corpus(DOCUMENTS, name) for name in ("one", "two")]
    for prefix in prefixes:
        write_sums(prefix)
    assert main(prefixes) == 0
    assert capsys.readouterr().out.count("20,000 tokens, every byte as it was written") == 2
    flip(Path(prefixes[0] + ".bin"), -1)
    assert main(prefixes) == 2
    out, err = capsys.readouterr()
    assert "one.bin (bytes 32768 to 39999) differs from its checksum" in err and out.startswith(prefixes[1])


def test_a_corpus_without_sums_is_recorded_once(
    write_corpus: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_corpus(DOCUMENTS)
    assert main([prefix]) == 0 and "nothing recorded" in capsys.readouterr().out
    assert main([prefix, "--record"]) == 0 and f"wrote {prefix}.sums" in capsys.readouterr().out
    flip(Path(prefix + ".bin"), 7)
    assert main([prefix, "--record"]) == 2, "what was recorded stays"


def test_sums_that_are_gone_are_not_made_of_another_content(
    write_corpus: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_corpus(DOCUMENTS)
    Path(prefix + ".json").write_text(f'{{"fingerprint": "{write_sums(prefix)}"}}')
    Path(prefix + ".sums").unlink()
    flip(Path(prefix + ".bin"), 7)
    assert main([prefix, "--record"]) == 2 and "differs from the one that was recorded" in capsys.readouterr().err
    flip(Path(prefix + ".bin"), 7)
    assert main([prefix, "--record"]) == 0 and Path(prefix + ".sums").is_file()


def test_damaged_sums_are_found_beside_a_whole_content(
    write_corpus: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The fingerprint is that of the content, so it does not tell."""
    prefix = write_corpus(DOCUMENTS)
    write_sums(prefix)
    flip(Path(prefix + ".sums"), -1)
    assert main([prefix]) == 2 and "differs from its checksum in corpus.sums" in capsys.readouterr().err

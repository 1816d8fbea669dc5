"""A corpus is read exactly, and everything wrong with its files is named."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_dllm.config import ModelConfig
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.source import check_fills_a_row
from megatron_dllm.data.spans import Spans
from megatron_dllm.data.spans_file import write_spans
from megatron_dllm.data.sums_file import sampled_fingerprint, write_sums
from megatron_dllm.data.tokenizer import tokenizer_fingerprint
from tests.unit.data.conftest import EOS, MASK, random_documents
from tests.unit.data.test_sums_file import DOCUMENTS as LONG
from tests.unit.data.test_sums_file import flip

DOCUMENTS = [[5, 6, 7, EOS], [8, EOS], [9, 10, 11, 12, 13, EOS]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_reads_what_was_written(write_corpus: Callable[..., str], model: ModelConfig, dtype: type) -> None:
    corpus = Corpus(write_corpus(DOCUMENTS, dtype=dtype, description={"num_bytes": 77}), model)
    assert corpus.document_lengths.tolist() == [4, 2, 6]
    assert (corpus.num_tokens, corpus.num_bytes) == (12, 77)
    assert corpus.read(0, 0, 4).tolist() == [5, 6, 7, EOS]
    assert corpus.read(2, 1, 3).tolist() == [10, 11, 12]
    assert corpus.read(2, 1, 3).dtype == np.int64
    assert [corpus.sample_id(d, o) for d, o in [(0, 0), (1, 0), (2, 0), (2, 4)]] == [0, 4, 6, 10]


def test_travels_to_another_process(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    corpus = pickle.loads(pickle.dumps(Corpus(write_corpus(DOCUMENTS), model)))
    assert corpus.read(1, 0, 2).tolist() == [8, EOS] and corpus.document_lengths.tolist() == [4, 2, 6]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(write_corpus: Callable[..., str], model: ModelConfig, suffix: str) -> None:
    prefix = write_corpus(DOCUMENTS)
    os.remove(prefix + suffix)
    with pytest.raises(ValueError, match=rf"has no corpus\{suffix}; give the prefix"):
        Corpus(prefix, model)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".bin", -2, r"corpus.bin \(22 bytes\) must have the 24 bytes"),
        (".bin", +2, r"corpus.bin \(26 bytes\) must have the 24 bytes"),
        (".idx", -8, r"corpus.idx \(94 bytes\) must have 102 bytes for its 3 documents"),
        (".idx", +8, r"corpus.idx \(110 bytes\) must have 102 bytes"),
        (".idx", -80, r"must be a Megatron index"),
    ],
)
def test_cut_off_or_grown_file(
    write_corpus: Callable[..., str], model: ModelConfig, suffix: str, change: int, message: str
) -> None:
    path = Path(write_corpus(DOCUMENTS) + suffix)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(ValueError, match=message):
        Corpus(str(path.with_suffix("")), model)


def test_index_that_is_none(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    prefix = write_corpus(DOCUMENTS)
    Path(prefix + ".idx").write_bytes(b"something else altogether, but long enough")
    with pytest.raises(ValueError, match="must be a Megatron index"):
        Corpus(prefix, model)


def test_index_of_floats(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    prefix = write_corpus(DOCUMENTS)
    data = bytearray(Path(prefix + ".idx").read_bytes())
    data[17:18] = struct.pack("<B", 7)
    Path(prefix + ".idx").write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"dtype code 7\) must be a version 1 index of integers"):
        Corpus(prefix, model)


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_empty_corpus(write_corpus: Callable[..., str], model: ModelConfig, documents: list) -> None:
    with pytest.raises(ValueError, match=r"corpus .* \(. documents, 0 bytes\) is empty"):
        Corpus(write_corpus(documents), model)


def test_token_outside_the_vocabulary(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    corpus = Corpus(write_corpus([[5, 6], [7, 8, 500, 9]]), model)
    assert corpus.read(1, 0, 2).tolist() == [7, 8]
    with pytest.raises(ValueError, match=r"token 500 of .*\(document 1, token 2\) must lie in .*\[0, 500\)"):
        corpus.read(1, 1, 3)
    negative = Corpus(write_corpus([[5, -1]], "negative", np.int32), model)
    with pytest.raises(ValueError, match=r"token -1 of .*\(document 0, token 1\)"):
        negative.read(0, 0, 2)


def test_mask_token_in_the_text(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    with pytest.raises(ValueError, match=r"token 2 of .*\(document 0, token 1\) is the mask token"):
        Corpus(write_corpus([[5, MASK, 6]]), model).read(0, 0, 3)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"max_token_id": 500}, r"largest token 500\) must lie in"),
        ({"eos_token_id": 7}, r"model.eos_token_id \(0\) differs from the corpus .* \(7\)"),
        ({"mask_token_id": 7}, r"model.mask_token_id \(2\) differs from the corpus .* \(7\)"),
        ({"num_tokens": 13}, r"\(12 tokens\) must have the 13 tokens"),
    ],
)
def test_description_that_contradicts_the_model(
    write_corpus: Callable[..., str], model: ModelConfig, description: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Corpus(write_corpus(DOCUMENTS, description=description), model)
    Corpus(write_corpus(DOCUMENTS, description={"eos_token_id": 0, "mask_token_id": None, "num_tokens": 12}), model)


def test_another_tokenizer(write_corpus: Callable[..., str], model: ModelConfig, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {name: 0}}}))
    prefix = write_corpus(DOCUMENTS, description={"tokenizer_fingerprint": tokenizer_fingerprint(tmp_path / "one")})
    Corpus(prefix, model, tokenizer=str(tmp_path / "one"))
    earlier = hashlib.sha256((tmp_path / "one" / "tokenizer.json").read_bytes()).hexdigest()
    of_earlier_versions = write_corpus(DOCUMENTS, "earlier", description={"tokenizer_fingerprint": earlier})
    Corpus(of_earlier_versions, model, tokenizer=str(tmp_path / "one"))
    with pytest.raises(ValueError, match=r"data.tokenizer \(.*other\) is not the tokenizer that made corpus"):
        Corpus(prefix, model, tokenizer=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"tokenizer \(.*none\) must be a folder with a tokenizer.json"):
        Corpus(prefix, model, tokenizer=str(tmp_path / "none"))


def test_less_than_a_row(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    corpus = Corpus(write_corpus(DOCUMENTS), model)
    check_fills_a_row(corpus, RowGeometry("block_diffusion", 4, 8, 24, 1))
    with pytest.raises(ValueError, match=r"\(12 tokens\) must hold more than one row of 25 tokens \(2 copies"):
        check_fills_a_row(corpus, RowGeometry("block_diffusion", 4, 8, 25, 1))
    with pytest.raises(ValueError, match=r"more than one row of 13 tokens \(1 copies"):
        check_fills_a_row(corpus, RowGeometry("ar", 1, 8, 13, 0))


def test_random_documents_come_back(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    documents = random_documents(50)
    corpus = Corpus(write_corpus(documents), model)
    for index, expected_tokens in enumerate(documents):
        assert corpus.read(index, 0, len(expected_tokens)).tolist() == expected_tokens


# --- what was recorded when it was written ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".spans", ".sums"])
def test_a_changed_bit_is_found_before_a_run_starts(
    write_corpus: Callable[..., str], model: ModelConfig, suffix: str
) -> None:
    prefix = write_corpus(DOCUMENTS)
    write_spans(Path(prefix + ".spans"), Spans.of_lists([[(0, 2, 1)], [], [(1, 3, 1), (4, 5, 2)]]))
    Path(prefix + ".json").write_text(f'{{"fingerprint": "{write_sums(prefix)}"}}')
    Corpus(prefix, model).verify()
    path = Path(prefix + suffix)
    for place in range(path.stat().st_size):
        flip(path, place)
        with pytest.raises(ValueError):
            Corpus(prefix, model).verify()
        flip(path, place)
    Corpus(prefix, model).verify()


def test_damage_that_comes_later_is_found_where_it_is_read(
    write_corpus: Callable[..., str], model: ModelConfig
) -> None:
    prefix = write_corpus(LONG)
    write_sums(prefix)
    corpus = Corpus(prefix, model)
    corpus.verify()
    with open(prefix + ".bin", "r+b") as file:
        file.seek(2 * 4000)
        file.write(b"\x09\x00" if LONG[1][0] != 9 else b"\x08\x00")
    assert corpus.read(4, 0, 9).tolist() == LONG[4][:9]
    with pytest.raises(ValueError, match=r"corpus.bin \(bytes 0 to 16383\) differs from its checksum"):
        corpus.read(1, 0, 9)


def test_without_sums_a_recorded_fingerprint_is_compared(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    prefix = write_corpus(DOCUMENTS, description={})
    fingerprint = write_sums(prefix)
    assert Corpus(prefix, model).fingerprint == fingerprint
    Path(prefix + ".json").write_text(f'{{"fingerprint": "{fingerprint}"}}')
    Path(prefix + ".sums").unlink()
    Corpus(prefix, model).verify()
    assert Corpus(prefix, model).fingerprint == fingerprint
    flip(Path(prefix + ".bin"), 3)
    with pytest.raises(ValueError, match=r"differs from the fingerprint in .*corpus.json"):
        Corpus(prefix, model).verify()


def test_sums_of_another_run(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    prefix = write_corpus(DOCUMENTS, description={"fingerprint": "0" * 64})
    write_sums(prefix)
    with pytest.raises(ValueError, match=r"corpus.sums \(fingerprint .*\) must be of the same run as .*corpus.json"):
        Corpus(prefix, model)


def test_a_corpus_of_which_nothing_was_recorded(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    corpus = Corpus(write_corpus(DOCUMENTS), model)
    corpus.verify()
    assert corpus.fingerprint == sampled_fingerprint(corpus.prefix) and corpus.chat_template is None


def test_a_description_of_wrong_types(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    with pytest.raises(ValueError, match=r"corpus.json: num_tokens \('12'\) must be of type int"):
        Corpus(write_corpus(DOCUMENTS, description={"num_tokens": "12"}), model)


@pytest.mark.parametrize(("num_documents", "has_spans"), [(3, True), (4, False)], ids=["half a pair", "no spans"])
def test_pairs_that_are_not_whole(
    write_corpus: Callable[..., str], model: ModelConfig, num_documents: int, has_spans: bool
) -> None:
    prefix = write_corpus([[5, 6, 0]] * num_documents, description={"kind": "pairs"})
    if has_spans:
        write_spans(Path(prefix + ".spans"), Spans.of_lists([[(1, 3, 1)]] * num_documents))
    with pytest.raises(ValueError, match=rf"\({num_documents} documents, .*\) must hold two documents of each pair"):
        Corpus(prefix, model)

"""Every input format gives the same documents, and bad ones are named by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_dllm.data.reading import BadDocumentError, RawDocument, decode_document, list_files, read_batches

TEXTS = ["one\nline two", "", "größe 字", "x" * 3000]


def read_texts(path: Path, text_key: str = "text") -> list[str]:
    batches = list(read_batches(list_files([str(path)]), text_key))
    return [decode_document(document, text_key) for batch in batches for document in batch.documents]


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text, "other": 1}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(json_lines(TEXTS[:2])) + pack(b"\n \n" + json_lines(TEXTS[2:])))  # two frames, blank lines
    assert read_texts(path) == TEXTS


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": TEXTS, "n": [1, 2, 3, 4]}), path)
    assert read_texts(path, "body") == TEXTS
    with pytest.raises(ValueError, match=r"text_key \(text\) must be a column of strings .* body \(string\), n \(int"):
        read_texts(path)
    with pytest.raises(ValueError, match=r"text_key \(n\) must be a column of strings"):
        read_texts(path, "n")
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="is not a readable parquet file"):
        read_texts(path)


def test_folder_is_walked_in_order_and_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "b" / ".git").mkdir(parents=True)
    for name, content in {
        "c.py": b"third",
        "a.txt": b"\xef\xbb\xbffirst",
        "b/z.md": b"second",
        "b/.git/x": b"hidden",
        "d.jsonl": json_lines(["fourth", "fifth"]),
    }.items():
        (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path) == ["first", "second", "third", "fourth", "fifth"]


def test_batches_are_bounded_and_account_for_every_byte(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["text"] * 1000))
    (tmp_path / "b.txt").write_bytes(b"y" * 3_000_000)
    (tmp_path / "c.txt").write_bytes(b"z")
    batches = list(read_batches(list_files([str(tmp_path)]), "text"))
    assert [len(batch.documents) for batch in batches] == [256, 256, 256, 233, 1]
    assert sum(batch.num_input_bytes for batch in batches) == sum(f.stat().st_size for f in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{nonsense", "not JSON"),
        (b"\xff\xfe{}", r"not UTF-8 \(byte 0\)"),
        (b'["text"]', "a JSON list, not an object"),
        (b'{"txt": "a", "b": 1}', r"no key 'text' \(it has b, txt\)"),
        (b'{"text": 3}', "text is a int, not a string"),
        (b'{"text": null}', "text is a NoneType, not a string"),
        (b'{"text": "ab\\ud800"}', r"half a surrogate pair \(character 2\)"),
        (b"[" * 100_000, "not JSON"),
        (None, "text is null"),
    ],
)
def test_bad_documents_say_why(content: bytes | None, message: str) -> None:
    with pytest.raises(BadDocumentError, match=message):
        decode_document(RawDocument("f:1", content, is_json=True), "text")


def test_sources_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": "b"}')
    (batch,) = read_batches([path], "text")
    assert [document.source for document in batch.documents] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_cut_off_compression_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    data = json_lines([str(n) * 50 for n in range(5000)])
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.ZstdCompressor().compress(data)
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"is damaged or cut off"):
        read_texts(path)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(ValueError, match=r"is damaged or cut off"):
        read_texts(path)


def test_unusable_inputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input \(.*none\) does not exist"):
        list_files([str(tmp_path / "none")])
    with pytest.raises(ValueError, match="is a folder without files"):
        list_files([str(tmp_path)])
    for name in ("a.json", "a.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"may be one JSON value or many; rename it to .jsonl"):
        list_files([str(tmp_path / "a.json")])
    with pytest.raises(ValueError, match="is named twice"):
        list_files([str(tmp_path / "a.txt"), str(tmp_path)])

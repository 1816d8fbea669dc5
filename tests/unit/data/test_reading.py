"""Every input format gives the same documents, and bad ones are named by file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_dllm.data.formats import EXTENSIONS
from megatron_dllm.data.listing import list_files
from megatron_dllm.data.reading import (
    LONGEST_DOCUMENT,
    BadDocumentError,
    RawDocument,
    decode_document,
    read_batches,
    read_file,
)

TEXTS = ["one\nline two", "", "größe 字", "x" * 3000]


def read_texts(path: Path, text_key: str = "text") -> list[str]:
    batches = list(read_batches(list_files([str(path)], text_key).files, text_key))
    return [decode_document(document, text_key) for batch in batches for document in batch.documents]


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text, "other": 1}) + "\n" for text in texts).encode()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonlines", ".JSONL", ".json"])
def test_json_lines_plain_and_compressed(tmp_path: Path, suffix: str, compression: str) -> None:
    pack = PACK[compression]
    path = tmp_path / f"a{suffix}{compression}"
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


def test_a_null_is_a_bad_document(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["one", None]}), tmp_path / "a.parquet")
    _, (missing, _) = read_file(tmp_path / "a.parquet", "body")
    assert (missing.source, missing.content, missing.problem) == (f"{tmp_path}/a.parquet:2", None, "body is null")


def test_folder_is_walked_in_order_and_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "b" / ".git").mkdir(parents=True)
    for name, content in {
        "c.TXT": b"third",
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
    batches = list(read_batches(list_files([str(tmp_path)], "text").files, "text"))
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
    ],
)
def test_bad_documents_say_why(content: bytes | None, message: str) -> None:
    with pytest.raises(BadDocumentError, match=message):
        decode_document(RawDocument("f:1", content, is_json=True), "text")


def test_a_document_without_content_says_why() -> None:
    with pytest.raises(BadDocumentError, match=r"^text is null$"):
        decode_document(RawDocument("f:1", None, problem="text is null"), "text")


def test_sources_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": "b"}')
    (batch,) = read_batches([path], "text")
    assert [document.source for document in batch.documents] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_cut_off_compression_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    packed = PACK[suffix](json_lines([str(n) * 50 for n in range(5000)]))
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"is damaged or cut off"):
        read_texts(path)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(ValueError, match=r"is damaged or cut off"):
        read_texts(path)


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_plain_and_compressed(tmp_path: Path, indent: int | None, compression: str) -> None:
    texts = [*TEXTS, 'quo"tes, [brackets] {braces} and back\\slashes\\\\', "\u2028"]
    path = tmp_path / f"a.json{compression}"
    content = json.dumps([{"meta": {"tags": ["a,b", []]}, "text": text} for text in texts], indent=indent)
    path.write_bytes(PACK[compression](b"\xef\xbb\xbf\n " + content.encode() + b"\n"))
    assert read_texts(path) == texts


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"text": "a"}, {"text": "b"}', "its JSON array does not end"),
        ('[{"text": "a"}, {"text": "b', "its JSON array does not end"),
        ('[{"text": "a"}, {"text": "b"},', "its JSON array does not end"),
        ('[{"text": "a"}, {"text": "b"}}, {"text": "c"}]', "something follows the end"),
        ('[{"text": "a"}]\n[{"text": "b"}]\n', "something follows the end"),
    ],
)
def test_a_broken_array_is_an_error(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json\) is damaged or cut off: {problem}"):
        read_texts(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", []),
        (" \n\n", []),
        ("[]", []),
        ("[ ]\n", []),
        ('{"text": "alone"}', ["alone"]),
        ('{\n  "text": "over lines"\n}\n', ["over lines"]),
        ('\n{"text": "a"}\n\n{"text": "b"}\n', ["a", "b"]),
        ('{"text": "a"}\n{nonsense\n{"text": "b"}\n', ["a", "not JSON", "b"]),
        ('[{"text": "a"}, {"txt": "b"}, 3, {"text": "c"} {"text": "d"}]', ["a", "no key", "a JSON int", "not JSON"]),
        ("no JSON at all", ["not JSON"]),
    ],
)
def test_json_files_are_told_by_their_beginning(tmp_path: Path, content: str, expected: list[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    found = [text_or_problem(document) for document, _ in read_file(path, "text")]
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def text_or_problem(document: RawDocument) -> str:
    try:
        return decode_document(document, "text")
    except BadDocumentError as error:
        return str(error)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    mark, path = "\ufeff", tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": [mark + "one \ufeff"]}), path)
    else:
        line = json.dumps({"text": mark + "one \ufeff"}, ensure_ascii=False)
        path.write_text(mark + ("one \ufeff" if suffix == ".txt" else line), encoding="utf-8")
    assert read_texts(path) == ["one \ufeff"]


def test_a_file_of_nothing_but_a_byte_order_mark(tmp_path: Path) -> None:
    for suffix, expected in ((".txt", [""]), (".jsonl", []), (".json", [])):
        (tmp_path / f"a{suffix}").write_bytes(b"\xef\xbb\xbf\n" if suffix != ".txt" else b"\xef\xbb\xbf")
        assert read_texts(tmp_path / f"a{suffix}") == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt.gz", ".parquet"])
def test_a_document_that_is_too_long_is_a_bad_one(tmp_path: Path, suffix: str) -> None:
    path, text = tmp_path / f"a{suffix}", "x" * (LONGEST_DOCUMENT + 1)
    documents = [{"text": "before"}, {"text": text}, {"text": "after"}]
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(documents), path)
    elif suffix == ".txt.gz":
        path.write_bytes(gzip.compress(text.encode(), 1))
    else:
        path.write_text(json.dumps(documents) if suffix == ".json" else "\n".join(map(json.dumps, documents)))
    found = [text_or_problem(document) for document, _ in read_file(path, "text")]
    too_long = "longer than 64 MiB, the most that one document may have; split it"
    assert found == ([too_long] if suffix == ".txt.gz" else ["before", too_long, "after"])


_READ_AND_MEASURE = """
import resource, sys
from pathlib import Path
from megatron_dllm.data.reading import read_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
documents = [document for document, _ in read_file(Path(sys.argv[1]), "text")]
print(len(documents), sum(document.content is None for document in documents))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.ranks
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.zst", ".ndjson.bz2", ".txt.xz"])
def test_memory_does_not_grow_with_a_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    opening, closing = (b"[", b"]") if ".json." in suffix else (b"", b"")
    start, filling, end = opening + b'{"text": "', b"x" * (1 << 20), b'"}' + closing
    pack = PACK[path.suffix]
    if path.suffix == ".zst":  # in a single frame, which is a few kilobytes and could be unpacked at once
        path.write_bytes(pack(start + filling * 320 + end))
    else:
        path.write_bytes(pack(start) + pack(filling) * 320 + pack(end))
    command = [sys.executable, "-c", _READ_AND_MEASURE, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    (num_documents, num_bad), (peak_mib,) = (map(int, line.split()) for line in output.splitlines())
    assert (num_documents, num_bad) == (1, 1)
    assert peak_mib < 3 * LONGEST_DOCUMENT >> 20  # of a line five times the limit


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_with_a_long_window(tmp_path: Path, window_log: int) -> None:
    path = tmp_path / "a.jsonl.zst"
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()  # as --long does: no size in the frame
    path.write_bytes(packer.compress(json_lines(TEXTS)) + packer.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << window_log
    assert read_texts(path) == TEXTS


def test_zstd_frames_without_documents_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    packed = zstandard.ZstdCompressor().compress(json_lines(TEXTS))
    path.write_bytes(skippable + packed + zstandard.ZstdCompressor().compress(b"") + skippable)
    assert read_texts(path) == TEXTS


def test_every_known_extension_is_read(tmp_path: Path) -> None:
    for suffix in EXTENSIONS:
        path = tmp_path / f"a{suffix}"
        if suffix == ".parquet":
            parquet.write_table(pyarrow.table({"text": ["words"]}), path)
        else:
            path.write_bytes(b"words" if suffix in (".txt", ".md") else json_lines(["words"]))
    assert read_texts(tmp_path) == ["words"] * len(EXTENSIONS)


def test_many_keys_make_a_short_message() -> None:
    content = json.dumps({f"{n:03d}" + "k" * 99: 1 for n in range(999)}).encode()
    with pytest.raises(BadDocumentError, match=r"no key 'text' \(it has 000k+, .*, 011k+, \.\.\.\)") as raised:
        decode_document(RawDocument("f:1", content, is_json=True), "text")
    assert len(str(raised.value)) < 600

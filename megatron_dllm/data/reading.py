"""Reads documents from text files, JSON lines and parquet, in a fixed order, and names those that are bad.

Reading is split in two: the main process cuts files into raw documents (cheap), worker processes decode
them (`decode_document`), so that parsing is spread over processes too.

A `.jsonl` line (also `.jsonl.gz`, `.jsonl.zst`) and a `.parquet` row are a document each; any other file
is one document as a whole. A folder is read in the order of its sorted paths; hidden files are left out.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_BATCH_DOCUMENTS = 256
_BATCH_BYTES = 1 << 20
_JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_PARQUET = ".parquet"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawDocument:
    """A document as it lies in its file.

    Attributes:
        source: `file` or `file:line`, lines and rows counted from 1.
        content: bytes of the line, file or value; None for a parquet value that is null.
        is_json: whether the content is a JSON object that holds the text.
    """

    source: str
    content: bytes | None
    is_json: bool = False


@dataclass(frozen=True)
class RawBatch:
    """Consecutive documents, and the bytes of input files passed with them (for the progress bar)."""

    documents: list[RawDocument]
    num_input_bytes: int


class BadDocumentError(ValueError):
    """A document without readable text; says why."""


def list_files(inputs: list[str]) -> list[Path]:
    """Files of the inputs, folders walked in sorted order.

    Raises:
        ValueError: where an input does not exist, is named twice or holds no file, or has an unclear format.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"input ({name}) does not exist; give a text file, .jsonl, .parquet, or a folder of them.")
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
            if not found:
                raise ValueError(f"input ({name}) is a folder without files; give one that holds text.")
            files += found
        elif path.name.endswith((".json", ".json.gz", ".json.zst")):
            raise ValueError(
                f"input ({name}) may be one JSON value or many; rename it to .jsonl if every line "
                "is an object of its own, else to .txt."
            )
        else:
            files.append(path)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise ValueError(f"input ({file}) is named twice; its documents would be, too.")
        seen.add(file.resolve())
    return files


def read_batches(files: list[Path], text_key: str) -> Iterator[RawBatch]:
    """Cut files into batches of documents, the same batches every time.

    Args:
        files: in order.
        text_key: parquet column that holds the text.

    Raises:
        ValueError: where a file cannot be read at all (damaged compression, no such column).
    """
    documents: list[RawDocument] = []
    num_bytes, passed, file_start = 0, 0, 0
    for file in files:
        for document, position in _read_file(file, text_key):
            documents.append(document)
            num_bytes += len(document.content or b"")
            if len(documents) == _BATCH_DOCUMENTS or num_bytes >= _BATCH_BYTES:
                yield RawBatch(documents, file_start + position - passed)
                documents, num_bytes, passed = [], 0, file_start + position
        file_start += file.stat().st_size
    if documents:
        yield RawBatch(documents, file_start - passed)


def decode_document(document: RawDocument, text_key: str) -> str:
    """The text of a document.

    Raises:
        BadDocumentError: where it is not UTF-8, not a JSON object, or has no string under `text_key`.
    """
    if document.content is None:
        raise BadDocumentError(f"{text_key} is null")
    try:
        text = document.content.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocumentError(f"not UTF-8 (byte {error.start})") from error
    return _text_of_json(text, text_key) if document.is_json else text


def _text_of_json(line: str, text_key: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadDocumentError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadDocumentError(f"a JSON {type(value).__name__}, not an object")
    if text_key not in value:
        raise BadDocumentError(f"no key {text_key!r} (it has {', '.join(sorted(value)) or 'none'})")
    text = value[text_key]
    if not isinstance(text, str):
        raise BadDocumentError(f"{text_key} is a {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800": JSON can write half a surrogate pair, UTF-8 cannot
        raise BadDocumentError(f"half a surrogate pair (character {error.start})") from error
    return text


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _read_file(file: Path, text_key: str) -> Iterator[tuple[RawDocument, int]]:
    """Documents of a file, each with the bytes of the file read so far."""
    if file.name.endswith(_JSON_LINES):
        return _read_lines(file)
    if file.name.endswith(_PARQUET):
        return _read_parquet(file, text_key)
    return iter([(RawDocument(str(file), file.read_bytes()), file.stat().st_size)])


def _read_lines(file: Path) -> Iterator[tuple[RawDocument, int]]:
    from zstandard import ZstdError

    with file.open("rb") as raw:
        try:
            for number, line in enumerate(_decompressed(file, raw), start=1):
                if line.strip():
                    yield RawDocument(f"{file}:{number}", line, is_json=True), raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error, ZstdError) as error:
            raise ValueError(f"input ({file}) is damaged or cut off: {error}; fetch or compress it again.") from error


def _decompressed(file: Path, raw: BinaryIO) -> Iterable[bytes]:
    if file.suffix == ".gz":
        return gzip.open(raw, "rb")
    return _zstd_lines(raw) if file.suffix == ".zst" else raw


def _zstd_lines(raw: BinaryIO) -> Iterator[bytes]:
    """Lines of one or more frames; unlike the library's own stream reader it notices that a file is cut off."""
    from zstandard import ZstdDecompressor

    frame, rest = None, b""
    while chunk := raw.read(_BATCH_BYTES // 8):
        while chunk:
            frame = frame or ZstdDecompressor().decompressobj()
            *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
            yield from lines
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends inside a frame")
    if rest:
        yield rest


def _read_parquet(file: Path, text_key: str) -> Iterator[tuple[RawDocument, int]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"input ({file}) is not a readable parquet file: {error}.") from error
    column = table.schema_arrow.field(text_key) if text_key in table.schema_arrow.names else None
    if column is None or not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        raise ValueError(
            f"text_key ({text_key}) must be a column of strings in {file}; it has "
            f"{', '.join(f'{field.name} ({field.type})' for field in table.schema_arrow)}."
        )
    size, num_rows, row = file.stat().st_size, table.metadata.num_rows, 0
    for batch in table.iter_batches(batch_size=_BATCH_DOCUMENTS, columns=[text_key]):
        # As bytes: text that is not UTF-8 is then a bad document and not the end of the file.
        for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
            row += 1
            yield RawDocument(f"{file}:{row}", value), size * row // num_rows

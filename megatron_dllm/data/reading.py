"""Reads documents from text files, JSON and parquet, in a fixed order, and names those that are bad.

Reading is split in two: the main process cuts files into raw documents (cheap), worker processes decode
them (`decode_document`), so that parsing is spread over processes too.

A line of a JSON-lines file, an element of a JSON array and a row of a parquet file are a document each; a text file is
one document as a whole. A document of more than `LONGEST_DOCUMENT` bytes is a bad one and is never held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_dllm.data import cutting
from megatron_dllm.data.decompression import read_pieces
from megatron_dllm.data.formats import Layout, layout_of

LONGEST_DOCUMENT = 1 << 26  # bytes as it lies in its file; 64 MiB are some 16 million tokens
_BATCH_DOCUMENTS = 256
_BATCH_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_KEYS_SHOWN, _KEY_LENGTH_SHOWN = 12, 40
_TOO_LONG = f"longer than {LONGEST_DOCUMENT >> 20} MiB, the most that one document may have; split it"


@dataclass(frozen=True)
class RawDocument:
    """A document as it lies in its file.

    Attributes:
        source: `file` or `file:number`; lines, elements and rows are counted from 1.
        content: bytes of the line, element, value or file; None where there is nothing to decode.
        is_json: whether the content is a JSON object that holds the text.
        problem: why there is no content.
    """

    source: str
    content: bytes | None
    is_json: bool = False
    problem: str = ""


@dataclass(frozen=True)
class RawBatch:
    """Consecutive documents, and the bytes of input files passed with them (for the progress bar)."""

    documents: list[RawDocument]
    num_input_bytes: int


class BadDocumentError(ValueError):
    """A document without readable text; says why."""


def read_batches(files: list[Path], text_key: str | None) -> Iterator[RawBatch]:
    """Cut files into batches of documents, the same batches every time.

    Args:
        files: in order, each of a known format (see `formats`).
        text_key: parquet column that holds the text; None: a row as a whole is a document, as of chats.

    Raises:
        ValueError: a file cannot be read at all (damaged compression, no such column, an array without an end).
    """
    documents: list[RawDocument] = []
    num_bytes, passed, file_start = 0, 0, 0
    for file in files:
        for document, position in read_file(file, text_key):
            documents.append(document)
            num_bytes += len(document.content or b"")
            if len(documents) == _BATCH_DOCUMENTS or num_bytes >= _BATCH_BYTES:
                yield RawBatch(documents, file_start + position - passed)
                documents, num_bytes, passed = [], 0, file_start + position
        file_start += file.stat().st_size
    if documents:
        yield RawBatch(documents, file_start - passed)


def read_file(file: Path, text_key: str | None) -> Iterator[tuple[RawDocument, int]]:
    """Documents of a file, each with the bytes of the file that have been read so far.

    Raises:
        ValueError: the file cannot be read at all.
    """
    layout = layout_of(file.name)
    assert layout is not None, f"{file} was not listed by list_files"
    if layout is Layout.PARQUET:
        return _read_parquet_rows(file) if text_key is None else _read_parquet(file, text_key)
    if layout is Layout.LINES:
        return _read_many(file, cutting.lines)
    return _read_json(file) if layout is Layout.JSON else _read_whole(file, is_json=False)


def decode_document(document: RawDocument, text_key: str) -> str:
    """The text of a document. A byte order mark at its beginning is no text.

    Raises:
        BadDocumentError: it is not UTF-8, not a JSON object, has no string under `text_key`, or has no content.
    """
    text = _decode(document)
    return _text_of(_parse(text), text_key).removeprefix("\ufeff") if document.is_json else text


def decode_record(document: RawDocument) -> dict[str, Any]:
    """The JSON object that a document is.

    Raises:
        BadDocumentError: it is not UTF-8, not a JSON object, or has no content.
    """
    return _parse(_decode(document))


def _decode(document: RawDocument) -> str:
    if document.content is None:
        raise BadDocumentError(document.problem)
    try:
        return document.content.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocumentError(f"not UTF-8 (byte {error.start})") from error


def _parse(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadDocumentError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadDocumentError(f"a JSON {type(value).__name__}, not an object")
    return value


def _text_of(value: dict[str, Any], text_key: str) -> str:
    if text_key not in value:
        keys = [key[:_KEY_LENGTH_SHOWN] for key in sorted(value)[:_KEYS_SHOWN]]
        more = ["..."] * (len(value) > _KEYS_SHOWN)
        raise BadDocumentError(f"no key {text_key!r} (it has {', '.join([*keys, *more]) or 'none'})")
    text = value[text_key]
    if not isinstance(text, str):
        raise BadDocumentError(f"{text_key} is a {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800": JSON can write half a surrogate pair, UTF-8 cannot
        raise BadDocumentError(f"half a surrogate pair (character {error.start})") from error
    return text


def _read_many(
    file: Path, cut: Callable[[Iterable[bytes], int], Iterator[bytes | None]]
) -> Iterator[tuple[RawDocument, int]]:
    """A document for each text that `cut` finds in the file, blank ones left out."""
    with file.open("rb") as raw:
        try:
            for number, content in enumerate(cut(read_pieces(file, raw), LONGEST_DOCUMENT), start=1):
                if content is None:
                    yield RawDocument(f"{file}:{number}", None, problem=_TOO_LONG), raw.tell()
                elif content.removeprefix(_BYTE_ORDER_MARK).strip():
                    yield RawDocument(f"{file}:{number}", content, is_json=True), raw.tell()
        except cutting.BrokenArrayError as error:
            raise ValueError(f"input ({file}) is damaged or cut off: {error}; fetch or write it again.") from error


def _read_whole(file: Path, is_json: bool) -> Iterator[tuple[RawDocument, int]]:
    with file.open("rb") as raw:
        content = cutting.whole(read_pieces(file, raw), LONGEST_DOCUMENT)
        yield RawDocument(str(file), content, is_json, _TOO_LONG * (content is None)), file.stat().st_size


def _read_json(file: Path) -> Iterator[tuple[RawDocument, int]]:
    """Documents of a .json file: many write JSON lines under that name, so its beginning decides."""
    start, has_more = _first_line(file)
    if start.startswith(b"["):
        return _read_many(file, cutting.array_elements)
    if not start or (has_more and _is_json_object(start)):
        return _read_many(file, cutting.lines)
    return _read_whole(file, is_json=True)


def _first_line(file: Path) -> tuple[bytes, bool]:
    """First line that is not blank (of an array only its beginning), and whether another one follows."""
    with file.open("rb") as raw:
        pieces = read_pieces(file, raw)
        start = next((piece for piece in pieces if piece.removeprefix(_BYTE_ORDER_MARK).strip()), b"")
        start = start.removeprefix(_BYTE_ORDER_MARK).lstrip()
        if start.startswith(b"["):
            return start, True
        filled = (
            line for line in cutting.lines(chain([start], pieces), LONGEST_DOCUMENT) if line is None or line.strip()
        )
        first = next(filled, b"")
        return first or b"", next(filled, b"") != b""


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_parquet(file: Path, text_key: str) -> Iterator[tuple[RawDocument, int]]:
    # Imported here because it takes a moment that other formats should not cost.
    from megatron_dllm.data.parquet_text import read_text_column

    size = file.stat().st_size
    for row, (value, share) in enumerate(read_text_column(file, text_key, _BATCH_DOCUMENTS), start=1):
        problem = f"{text_key} is null"
        if value is not None and len(value) > LONGEST_DOCUMENT:
            value, problem = None, _TOO_LONG
        yield RawDocument(f"{file}:{row}", value, problem=problem * (value is None)), int(size * share)


def _read_parquet_rows(file: Path) -> Iterator[tuple[RawDocument, int]]:
    from megatron_dllm.data.parquet_chats import read_chat_columns

    size = file.stat().st_size
    for row, (value, share) in enumerate(read_chat_columns(file, _BATCH_DOCUMENTS), start=1):
        content = value if len(value) <= LONGEST_DOCUMENT else None
        problem = _TOO_LONG * (content is None)
        yield RawDocument(f"{file}:{row}", content, is_json=True, problem=problem), int(size * share)

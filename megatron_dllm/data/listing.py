"""Lists the files that documents are read from, and everything that is left out, each with its reason.

A folder is read in the order of its sorted paths. Links are followed; what they reach a second time is left out, so
that a link back to a folder above ends there. A link that leads nowhere is an error: data that is meant to be there is
missing, as in a cache that was copied without its blobs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_dllm.data.chat import chat_of
from megatron_dllm.data.formats import KNOWN, Layout, layout_of
from megatron_dllm.data.reading import BadDocumentError, decode_document, decode_record, read_file

# Beside a data set's records these describe it.
_DESCRIPTIONS = ("readme", "license", "licence")
_NUM_SHOWN = 5
_TEXT_FILE = "is a text file, which holds no chats"


@dataclass(frozen=True)
class Listing:
    """Files of some inputs.

    Attributes:
        files: to read, in order.
        left_out: `path: reason` of everything else in the folders, in order.
    """

    files: list[Path]
    left_out: list[str]


def list_files(inputs: list[str], text_key: str | None) -> Listing:
    """Files of the inputs, folders walked in sorted order.

    Args:
        inputs: files and folders.
        text_key: key that holds the text: a .json file in a folder that is one object without it is no document;
            None: documents are chats, which no text file holds.

    Raises:
        ValueError: an input does not exist, is named twice, holds no file, or is a file of an unknown format; or a
            link leads nowhere.
    """
    files: list[Path] = []
    left_out: list[str] = []
    for name in inputs:
        path = Path(name)
        _check_exists(path)
        if path.is_dir():
            found, others = _list_folder(path, text_key)
            if not found:
                raise ValueError(_nothing_found(name, others))
            files, left_out = files + found, left_out + others
        elif not path.is_file():
            raise ValueError(f"input ({name}) is not a regular file; write its content to one.")
        elif layout_of(path.name) is None:
            raise ValueError(
                f"input ({name}) has an unknown extension, known are {KNOWN}; rename it to .txt if the whole file is "
                "one document."
            )
        elif text_key is None and layout_of(path.name) is Layout.TEXT:
            raise ValueError(f"input ({name}) {_TEXT_FILE}; give .jsonl, .json or .parquet.")
        else:
            files.append(path)
    _check_distinct(files)
    return Listing(files, left_out)


def _check_exists(path: Path) -> None:
    if path.exists():
        return
    if path.is_symlink():
        raise ValueError(
            f"input ({path}) is a link to {os.readlink(path)}, which does not exist; restore that or remove the link."
        )
    raise ValueError(f"input ({path}) does not exist; give files ({KNOWN}) or folders of them.")


def _check_distinct(files: list[Path]) -> None:
    seen: set[str] = set()
    for file in files:
        place = os.path.realpath(file)
        if place in seen:
            raise ValueError(f"input ({file}) is named twice; its documents would be, too.")
        seen.add(place)


def _nothing_found(name: str, left_out: list[str]) -> str:
    if not left_out:
        return f"input ({name}) is a folder without files; give one that holds text."
    more = f" and {len(left_out) - _NUM_SHOWN} more" if len(left_out) > _NUM_SHOWN else ""
    return (
        f"input ({name}) holds no file that can be read, known are {KNOWN}; left out: "
        f"{'; '.join(left_out[:_NUM_SHOWN])}{more}."
    )


def _list_folder(folder: Path, text_key: str | None) -> tuple[list[Path], list[str]]:
    """(files to read, what is left out) of a folder."""
    entries = list(_walk(folder, text_key is None))
    records = [path for path, reason in entries if not reason and layout_of(path.name) is not Layout.TEXT]
    described = {parent for path in records for parent in path.parents}
    files, left_out = [], []
    for path, reason in entries:
        reason = reason or _describes(path, described) or _no_document(path, text_key)
        if reason:
            left_out.append(f"{path}: {reason}")
        else:
            files.append(path)
    return files, left_out


def _walk(folder: Path, has_chats: bool) -> Iterator[tuple[Path, str]]:
    """What lies in a folder, sorted, each with the reason to leave it out ("" for a file to read)."""
    reached: dict[str, Path] = {}  # real path: under which name it was reached
    pending = [folder]
    while pending:
        path = pending.pop()
        if path != folder and path.name.startswith("."):
            yield path, "hidden"
            continue
        _check_exists(path)
        reason = "" if path.is_dir() else _reason_of_name(path, has_chats)
        earlier = path if reason else reached.setdefault(os.path.realpath(path), path)
        if reason or earlier != path:
            yield path, reason or f"the same as {earlier}"
        elif path.is_dir():
            pending += sorted(path.iterdir(), reverse=True)
        else:
            yield path, ""


def _reason_of_name(path: Path, has_chats: bool) -> str:
    if not path.is_file():
        return "not a regular file"
    if has_chats and layout_of(path.name) is Layout.TEXT:
        return _TEXT_FILE
    return "" if layout_of(path.name) else "unknown extension"


def _describes(path: Path, described: set[Path]) -> str:
    """Why a text file is no document: it is the card or the licence of the data set in its folder."""
    is_description = path.name.lower().split(".")[0] in _DESCRIPTIONS and layout_of(path.name) is Layout.TEXT
    return "describes the data set beside it" if is_description and path.parent in described else ""


def _no_document(path: Path, text_key: str | None) -> str:
    """Why a .json file is no document: it is a single value without text, as settings and descriptions are."""
    if layout_of(path.name) is not Layout.JSON:
        return ""
    documents = read_file(path, text_key)
    document = next((document for document, _ in documents), None)
    if document is None or document.content is None or next(documents, None) is not None:
        return ""
    try:
        if text_key is None:
            chat_of(decode_record(document))
        else:
            decode_document(document, text_key)
    except BadDocumentError as error:
        is_whole_file = document.source == str(path)  # and not the only element of an array
        missing = "a chat" if text_key is None else "text"
        return f"a single JSON value without {missing}: {error}" if is_whole_file and _is_json(document.content) else ""
    return ""


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True

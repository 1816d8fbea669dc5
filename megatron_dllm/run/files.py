"""Write small files and folders so that a reader sees the old content or the new, never a part of it.

Standard library only: a job's supervisor uses it under the node's own Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

# What a name begins with while its content is being written, or after its writer was interrupted.
TEMPORARY_PREFIX = ".tmp-"


def write_text(path: Path, text: str, mode: int | None = None) -> None:
    """Write a text file in UTF-8 through `write_bytes`."""
    write_bytes(path, text.encode(), mode)


def write_bytes(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write a file through `replacing`."""
    with replacing(path, mode) as stream:
        stream.write(content)


@contextlib.contextmanager
def replacing(path: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """Give what writes a temporary file, which gets its name when the block has ended, and goes where that fails.

    Args:
        path: of the file.
        mode: its permissions; None: those of the file that it replaces, or what the umask gives.
    """
    # Process numbers repeat in every container, and two of them may share the folder.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
        with naming(path), open(descriptor, "wb") as stream:
            with contextlib.suppress(FileNotFoundError):
                if mode is None:
                    os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, *, indent: int = 1, sort_keys: bool = False, ensure_ascii: bool = True) -> None:
    """Write a value as JSON through `write_text`; the options go to `json.dumps`."""
    write_text(path, json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii) + "\n")


def parse_json(text: str | bytes) -> Any:
    """JSON whose objects name nothing twice: of two values, readers would take one or the other.

    Raises:
        ValueError: it is not JSON, names something twice, or is nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return found


@contextlib.contextmanager
def parents_made(path: Path) -> Iterator[None]:
    """Make the folders above a path. Those it had to make go again where the block fails and leaves them empty."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of writing name the file: what a full disk says to an open one names nothing."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def append_line(path: Path, line: str) -> None:
    """Add one line to a file, in a single write; a line that another writer left half-way ends before it."""
    with naming(path), open(path, "a+b", buffering=0) as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        is_torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * is_torn + line.encode() + b"\n")


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        remedy: what to do if the file is damaged; the error message ends with it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not JSON, or names something twice.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged (no JSON: {error}); {remedy}.") from None


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: of the file.
        remedy: what to do if the file is damaged; the error message ends with it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not JSON, or not an object.
    """
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (no JSON object, but {type(value).__name__}); {remedy}.")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines; none where there is no file.

    A line that is no object is passed over: the last one may be half-written, by a run that was killed or still goes
    on. Lines end at line feeds alone, because a text may hold other separators, such as U+2028.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            records.append(value)
    return records


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or folder if it exists. A folder is renamed first, so that its name never stands for half of it."""
    if path.is_dir():
        doomed = path
        if not path.name.startswith(TEMPORARY_PREFIX):
            doomed = path.with_name(f"{TEMPORARY_PREFIX}old-{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(path, doomed)
        shutil.rmtree(doomed)
    elif path.exists():
        path.unlink()


def refuse_dead_link(path: Path) -> None:
    """Raise ValueError where a path is a link that leads nowhere, as in a folder that was downloaded in part."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {path.readlink()}, which does not exist; download it again.")


def copy_files(files: Iterable[Path], target: Path) -> None:
    """Copy the content of files into a new folder, which appears once it is complete.

    Links are followed and permissions are not carried over: the copy depends on nothing and can be deleted.

    Args:
        files: of different names.
        target: must not exist.
    """
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    remove(temporary)
    temporary.mkdir()
    for path in files:
        shutil.copyfile(path, temporary / path.name)
    os.replace(temporary, target)

"""manifest.json: size and sha256 of a checkpoint's files, written last, by which it is complete or damaged.

Pure standard library: tools read it without torch.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_dllm.run.files import read_json_object, write_json
from megatron_dllm.run.names import CONTRACT, MANIFEST, STATE, VALIDATION

_CHUNK = 1 << 22


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint, which holds an object.

    Raises:
        ValueError: the file is missing, no JSON, or something else than an object.
    """
    try:
        return read_json_object(path, "choose another checkpoint")
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: {path.parent} is not a complete checkpoint; choose another one."
        ) from None


def checksum(path: Path, stop: threading.Event | None = None) -> dict[str, Any]:
    """Size in bytes and sha256 of a file, or of a part of it once `stop` is set."""
    digest, size = hashlib.sha256(), 0
    view = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as stream:
        while not (stop and stop.is_set()) and (count := stream.readinto(view)):
            digest.update(view[:count])
            size += count
    return {"size": size, "sha256": digest.hexdigest()}


def payload_files(folder: Path) -> list[str]:
    """Names of the files that the manifest covers, sorted."""
    return sorted(f.name for f in folder.iterdir() if f.is_file() and f.name not in (MANIFEST, VALIDATION))


def damaged_files(
    folder: Path,
    manifest: dict[str, Any],
    names: Iterable[str],
    hash_content: bool = True,
    stop: threading.Event | None = None,
) -> list[str]:
    """One sentence for each of `names` that is missing, truncated or altered.

    With `hash_content` a file is read and not asked for its size: on a shared file system every question counts. Once
    `stop` is set, the answer is without meaning and comes soon.
    """
    problems = []
    for name in names:
        path, expected = folder / name, manifest[name]
        try:
            found = checksum(path, stop) if hash_content else {"size": path.stat().st_size}
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            problems.append(f"{path} is missing")
            continue
        if found["size"] != expected["size"]:
            problems.append(f"{path} has {found['size']} bytes instead of {expected['size']}")
        elif hash_content and found["sha256"] != expected["sha256"]:
            problems.append(f"{path} does not have the checksum it was written with")
    return problems


def write_manifest(folder: Path, checksums: dict[str, Any]) -> None:
    """Make a folder complete: list every file, with those checksums that are not known yet.

    Args:
        folder: holds all files of the checkpoint.
        checksums: size and sha256 of the files that were summed up as they were written.

    Raises:
        OSError: what lies on the disk is not what was written.
    """
    others = (name for name in payload_files(folder) if name not in checksums)
    manifest = checksums | {name: checksum(folder / name) for name in others}
    write_json(folder / MANIFEST, manifest, sort_keys=True)
    problems = damaged_files(folder, manifest, manifest, hash_content=False)
    if problems:
        raise OSError(f"what was written is not there: {problems[0]}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Size and sha256 of every file of a checkpoint, as they were written.

    Raises:
        ValueError: it is missing or no such table.
    """
    manifest = read_json(folder / MANIFEST)
    if (
        not all(
            isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
            for entry in manifest.values()
        )
        or CONTRACT not in manifest
    ):
        raise ValueError(
            f"{folder / MANIFEST} is damaged: it does not give sizes and checksums; choose another checkpoint."
        )
    return manifest


def fingerprint(folder: Path) -> str:
    """What tells a checkpoint from any other, wherever it lies: SHA-256 (hex) over the checksums of its files.

    Raises:
        ValueError: its manifest is missing or damaged.
    """
    manifest = read_manifest(folder)
    listed = "".join(f"{name} {manifest[name]['sha256']}\n" for name in sorted(manifest))
    return hashlib.sha256(listed.encode()).hexdigest()


def check_complete(folder: Path) -> None:
    """Refuse a folder with a file missing or cut short, or an altered description; tensors are compared when loading.

    Raises:
        ValueError: naming the files.
    """
    manifest = read_manifest(folder)
    problems = damaged_files(folder, manifest, manifest, hash_content=False)
    problems = problems or damaged_files(folder, manifest, [name for name in (CONTRACT, STATE) if name in manifest])
    if problems:
        raise ValueError(f"checkpoint {folder} is damaged: {'; '.join(problems)}; choose another checkpoint.")


def is_complete(folder: Path) -> bool:
    """Whether `check_complete` has nothing to say."""
    try:
        check_complete(folder)
    except ValueError:
        return False
    return True

"""PREFIX.sums, beside a corpus: a checksum for every page of its files, and a fingerprint of all that they hold.

The file in bytes, little-endian:

    magic "DLLMSUM" + version 1          8 bytes
    SHA-256 of the content               32 bytes
    sizes of .bin, .idx and .spans       3 x uint64; 0: there is no such file
    checksums                            uint32 (CRC-32) of each page of 16 KiB, one file after the other

Checksums find damage where a page is read: nobody has to read 4 TB to train on some of it. They take 0.025 % of the
corpus. The fingerprint tells one content from another, whatever the files are called.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.run.files import replacing

PAGE_BYTES = 2**14
FILES = (".bin", ".idx", ".spans")
_HEADER = struct.Struct("<8s32s3Q")
_MAGIC = b"DLLMSUM\x01"
_REMEDY = "copy the corpus again, or tokenize the text again"


@dataclass(frozen=True)
class FileSums:
    """The checksums of one file.

    Attributes:
        path: of the file.
        size: its bytes.
        checksums: [n] uint32 of its pages, often memory-mapped.
    """

    path: Path
    size: int
    checksums: NDArray[np.uint32]

    def pages_of(self, start: int, stop: int) -> range:
        """Numbers of the pages that hold bytes start..stop - 1."""
        return range(start // PAGE_BYTES, -(-stop // PAGE_BYTES))

    def check(self, content: NDArray[np.uint8], pages: Iterable[int]) -> None:
        """Compare pages with their checksums.

        Args:
            content: [size] uint8 of the file, often memory-mapped.
            pages: numbers of the pages.

        Raises:
            ValueError: naming the first page that differs.
        """
        for page in pages:
            start, stop = page * PAGE_BYTES, min((page + 1) * PAGE_BYTES, self.size)
            self.compare(page, zlib.crc32(content[start:stop].data))

    def compare(self, page: int, checksum: int) -> None:
        """Raise ValueError where the checksum of a page is not the recorded one."""
        if checksum != int(self.checksums[page]):
            start, stop = page * PAGE_BYTES, min((page + 1) * PAGE_BYTES, self.size)
            raise ValueError(
                f"{self.path} (bytes {start} to {stop - 1}) differs from its checksum in "
                f"{self.path.with_suffix('.sums').name}: it was damaged or changed after it was written; {_REMEDY}."
            )

    def check_some(self, num_pages: int) -> None:
        """Compare at most so many pages, spread over the file.

        Raises:
            ValueError: naming the first page that differs.
        """
        if self.size:
            self.check(np.memmap(self.path, mode="r", dtype=np.uint8), _spread(len(self.checksums), num_pages))


@dataclass(frozen=True)
class Sums:
    """What PREFIX.sums says.

    Attributes:
        fingerprint: SHA-256 (hex) of the content of all files.
        files: checksums by suffix.
    """

    fingerprint: str
    files: Mapping[str, FileSums]


def write_sums(prefix: str) -> str:
    """Read the files of a corpus once and write PREFIX.sums, which is complete or absent; returns the fingerprint."""
    digests = {suffix: _digest(Path(prefix + suffix)) for suffix in FILES}
    fingerprint = _fingerprint(digests)
    with replacing(Path(prefix + ".sums")) as file:
        file.write(_HEADER.pack(_MAGIC, bytes.fromhex(fingerprint), *(digest.size for digest in digests.values())))
        for digest in digests.values():
            file.write(np.asarray(digest.checksums, dtype="<u4").tobytes())
    return fingerprint


def read_sums(prefix: str) -> Sums | None:
    """Map PREFIX.sums into memory; None where there is none.

    Raises:
        ValueError: it is cut off or damaged, or the sizes of the corpus's files are others.
    """
    path = Path(prefix + ".sums")
    if not path.is_file():
        return None
    with path.open("rb") as file:
        raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise ValueError(f"{path} ({len(raw)} bytes of header) must hold the checksums of a corpus; {_REMEDY}.")
    _, fingerprint, *sizes = _HEADER.unpack(raw)
    counts = [-(-size // PAGE_BYTES) for size in sizes]
    size, expected_size = path.stat().st_size, _HEADER.size + 4 * sum(counts)
    if size != expected_size:
        raise ValueError(
            f"{path} ({size} bytes) must have {expected_size} bytes for {sum(counts)} pages: it is cut off or damaged; "
            f"{_REMEDY}."
        )
    checksums = np.memmap(path, mode="r", dtype=np.uint8)[_HEADER.size :].view("<u4")
    parts = np.split(checksums, np.cumsum(counts)[:-1])
    files = {
        suffix: FileSums(Path(prefix + suffix), size, part)
        for suffix, size, part in zip(FILES, sizes, parts, strict=True)
    }
    for file_sums in files.values():
        _check_size(file_sums)
    return Sums(fingerprint.hex(), files)


def sampled_fingerprint(prefix: str, num_pages: int = 256) -> str:
    """What stands for the fingerprint of a corpus without PREFIX.sums: from sizes, and pages spread over each file."""
    digest = hashlib.sha256()
    for suffix in FILES:
        path = Path(prefix + suffix)
        size = path.stat().st_size if path.is_file() else 0
        digest.update(f"{suffix} {size} ".encode())
        if size:
            content = np.memmap(path, mode="r", dtype=np.uint8)
            for page in _spread(-(-size // PAGE_BYTES), num_pages):
                digest.update(content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES].data)
    return f"sampled-{digest.hexdigest()}"


def content_fingerprint(prefix: str, sums: Sums | None = None) -> str:
    """The fingerprint computed anew, from every byte of the corpus; every page is compared with `sums` on the way.

    Raises:
        ValueError: naming the first page that differs from `sums`.
    """
    files = {} if sums is None else sums.files
    return _fingerprint({suffix: _digest(Path(prefix + suffix), files.get(suffix)) for suffix in FILES})


@dataclass(frozen=True)
class _Digest:
    size: int
    sha256: bytes
    checksums: array[int]


def _digest(path: Path, recorded: FileSums | None = None) -> _Digest:
    size, sha256, checksums = 0, hashlib.sha256(), array("I")  # 4 bytes a page: 1 GB for 4 TB
    for number, page in enumerate(_pages(path) if path.is_file() else ()):
        size += len(page)
        sha256.update(page)
        checksums.append(zlib.crc32(page))
        if recorded is not None and number < len(recorded.checksums):  # a file may grow while it is read
            recorded.compare(number, checksums[-1])
    return _Digest(size, sha256.digest(), checksums)


def _pages(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while page := file.read(PAGE_BYTES):
            yield page


def _fingerprint(digests: Mapping[str, _Digest]) -> str:
    whole = hashlib.sha256()
    for suffix, digest in digests.items():
        whole.update(f"{suffix} {digest.size} ".encode() + digest.sha256)
    return whole.hexdigest()


def _spread(num_pages: int, most: int) -> list[int]:
    """Numbers of at most so many pages, evenly spread from the first to the last."""
    return sorted(set(np.linspace(0, num_pages - 1, min(num_pages, most)).astype(np.int64).tolist()))


def _check_size(sums: FileSums) -> None:
    size = sums.path.stat().st_size if sums.path.is_file() else 0
    if size != sums.size:
        raise ValueError(
            f"{sums.path} ({size} bytes) must have the {sums.size} bytes that {sums.path.with_suffix('.sums').name} "
            f"names: it is cut off, or of another run; {_REMEDY}."
        )

"""The bytes of a plain or compressed file, a piece at a time, so that memory does not grow with what a file unpacks to.

Compressed files may consist of several streams one after the other, as `cat a.gz b.gz` and parallel compressors write
them. A file that ends inside a stream is an error, never a shorter file.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_PIECE = 1 << 17
# zstd unpacks all of what it is given: 4 KiB give at most 1024 blocks of 128 KiB, however well the file is packed.
_ZSTD_INPUT = 1 << 12
_ZSTD_LARGEST_WINDOW = 1 << 31  # of `zstd --long=31`; the library alone takes 128 MiB


def read_pieces(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Unpacked pieces of a file, as its extension says.

    Args:
        file: name of the file.
        raw: the file, open. Its position tells how much of it has been read.

    Raises:
        ValueError: the compressed data is damaged or cut off.
    """
    from zstandard import ZstdError

    try:
        yield from _unpacked(file.suffix.lower(), raw)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, ZstdError) as error:
        raise ValueError(f"input ({file}) is damaged or cut off: {error}; fetch or compress it again.") from error


def _unpacked(compression: str, raw: BinaryIO) -> Iterable[bytes]:
    if compression == ".gz":
        return _stream_pieces(gzip.GzipFile(fileobj=raw))
    if compression == ".bz2":
        return _stream_pieces(bz2.BZ2File(raw))
    if compression == ".xz":
        return _stream_pieces(lzma.LZMAFile(raw))
    return _zstd_pieces(raw) if compression == ".zst" else _stream_pieces(raw)


def _stream_pieces(stream: BinaryIO | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile) -> Iterator[bytes]:
    while piece := stream.read(_PIECE):
        yield piece


def _zstd_pieces(raw: BinaryIO) -> Iterator[bytes]:
    """Pieces of one or more frames; unlike the library's own stream reader this notices that a file is cut off."""
    from zstandard import ZstdDecompressor

    frame, held = None, bytearray()
    while packed := raw.read(_ZSTD_INPUT):
        while packed:
            frame = frame or ZstdDecompressor(max_window_size=_ZSTD_LARGEST_WINDOW).decompressobj()
            held += frame.decompress(packed)
            packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if len(held) >= _PIECE:
            yield bytes(held)
            held.clear()
    if frame is not None:
        raise EOFError("it ends inside a frame")
    yield bytes(held)

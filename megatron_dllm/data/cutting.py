"""Cuts a stream of bytes into lines, or into the elements of a JSON array, without holding more than one of them.

A piece of text longer than a limit is passed over and comes out as None, so that a line of a gigabyte costs no memory.

A JSON array is cut, not parsed: the elements are parsed by the processes that tokenize them. Cutting needs only the
brackets outside strings, which is why a parser that reads a stream (and would read that line as a whole) is no help.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # what is left of a string, up to its closing quote
_MARK = re.compile(rb'["{}\[\],]')
_DEEP_MARK = re.compile(rb'["{}\[\]]')  # commas inside an element end nothing


class BrokenArrayError(Exception):
    """The text is no JSON array; says why."""


def lines(pieces: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines without their line feeds; None for each of more than `limit` bytes."""
    return _join(_line_parts(pieces), limit)


def array_elements(pieces: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Elements of the JSON array that the pieces hold; None for each of more than `limit` bytes.

    An element may be no JSON itself: only brackets and quotes are looked at.

    Raises:
        BrokenArrayError: the array does not end, or something follows its end.
    """
    return _join(_element_parts(pieces), limit)


def whole(pieces: Iterable[bytes], limit: int) -> bytes | None:
    """All pieces together; None where they are more than `limit` bytes."""
    return next(_join(((piece, False) for piece in pieces), limit), b"")


def _join(parts: Iterable[tuple[bytes, bool]], limit: int) -> Iterator[bytes | None]:
    """Whole texts from (part, whether the text ends with it); the last one needs no end."""
    held: list[bytes] = []
    size = 0
    for part, is_end in parts:
        size += len(part)
        held.append(part)
        if size > limit:
            held.clear()
        if is_end:
            yield b"".join(held) if size <= limit else None
            held, size = [], 0
    if size:
        yield b"".join(held) if size <= limit else None


def _line_parts(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for line in ended:
            yield line, True
        yield rest, False


class _Position:
    """Where in a JSON text the next byte lies: in how many brackets, and whether in a string."""

    def __init__(self) -> None:
        self.depth = 0
        self.is_in_string = False

    def find_mark(self, text: bytes, start: int) -> int | None:
        """The place behind the next bracket or comma outside strings; None where the text holds no more."""
        while True:
            if self.is_in_string:
                closing = _STRING.match(text, start)
                assert closing is not None, "the pattern matches nothing at all too"
                if closing.end() == len(text):
                    return None
                self.is_in_string, start = False, closing.end() + 1
            found = (_DEEP_MARK if self.depth > 1 else _MARK).search(text, start)
            if found is None:
                return None
            start = found.end()
            if found[0] != b'"':
                return start
            self.is_in_string = True


def _element_parts(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Parts of the elements: what lies between the array's own brackets and commas."""
    position, is_over = _Position(), False
    for text in _whole_escapes(pieces):
        start, place = 0, 0 if is_over else position.find_mark(text, 0)
        while place and not is_over:
            mark = text[place - 1 : place]
            position.depth += (mark in b"[{") - (mark in b"]}")
            is_over = position.depth == 0
            if is_over or (mark == b"," and position.depth == 1):
                yield text[start : place - 1], True
                start = place
            elif mark == b"[" and position.depth == 1:  # the array's own: an element's bracket lies deeper
                start = place
            place = position.find_mark(text, place)
        if not is_over:
            yield text[start:], False
        elif text[start:].strip():
            raise BrokenArrayError("something follows the end of its JSON array")
    if not is_over:
        raise BrokenArrayError("its JSON array does not end")


def _whole_escapes(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, no piece of which ends between a backslash and what it escapes."""
    carried = b""
    for piece in pieces:
        text = carried + piece
        num_backslashes = len(text) - len(text.rstrip(b"\\"))
        carried = b"\\" * (num_backslashes % 2)
        yield text[: len(text) - len(carried)]
    yield carried

"""Reads what an offline W&B run has written: a log of protocol buffers in blocks, as LevelDB lays it out."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's history, each with its step, as W&B would draw them; what the service adds is left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    rows = []
    for content in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            step = row.pop("_step", record.history.step.num)
            rows.append({"step": step, **{name: value for name, value in row.items() if not name.startswith("_")}})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    place, parts = _FILE_HEADER, b""
    while place + _HEADER.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER.size:
            place += left
            continue
        _, length, kind = _HEADER.unpack_from(data, place)
        parts += data[place + _HEADER.size : place + _HEADER.size + length]
        place += _HEADER.size + length
        assert kind in (_WHOLE, _FIRST, _MIDDLE, _LAST)
        if kind in (_WHOLE, _LAST):
            yield parts
            parts = b""

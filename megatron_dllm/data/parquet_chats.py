"""The columns of a parquet file that hold chats, each row as a JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from megatron_dllm.data.chat import COLUMNS


def read_chat_columns(file: Path, batch_size: int) -> Iterator[tuple[bytes, float]]:
    """Rows as JSON, each with the share of the rows that have been read.

    Every struct of a column has all keys that one of them has, null where there is no value: nulls are left out.

    Raises:
        ValueError: the file is damaged, or has no column of chats.
    """
    try:
        table = parquet.ParquetFile(file)
        names = [name for name in table.schema_arrow.names if name in COLUMNS]
        if not names:
            found = ", ".join(table.schema_arrow.names)
            raise ValueError(f"input ({file}) has no column of chats ({', '.join(COLUMNS)}); it has {found}.")
        num_rows, row = table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=batch_size, columns=names):
            for value in batch.to_pylist():
                row += 1
                yield json.dumps(_without_nulls(value), ensure_ascii=False, default=str).encode("utf-8"), row / num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"input ({file}) is not a readable parquet file: {error}.") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value

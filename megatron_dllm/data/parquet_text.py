"""The text column of a parquet file, as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet, types

_TEXT_TYPES = (
    types.is_string,
    types.is_large_string,
    types.is_string_view,
    types.is_binary,
    types.is_large_binary,
    types.is_binary_view,
)


def read_text_column(file: Path, text_key: str, batch_size: int) -> Iterator[tuple[bytes | None, float]]:
    """Values of a column, None for a null, each with the share of the rows that have been read.

    Raises:
        ValueError: the file is damaged, or has no such column of text.
    """
    try:
        table = parquet.ParquetFile(file)
        _check_column(file, table.schema_arrow, text_key)
        num_rows, row = table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=batch_size, columns=[text_key]):
            column = batch.column(0)
            if types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes: text that is not UTF-8 is then a bad document and not the end of the file.
            for value in column.cast(pyarrow.large_binary()).to_pylist():
                row += 1
                yield value, row / num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"input ({file}) is not a readable parquet file: {error}.") from error


def _check_column(file: Path, schema: pyarrow.Schema, text_key: str) -> None:
    found = [field.type for field in schema if field.name == text_key]
    if len(found) == 1:
        kind = found[0].value_type if types.is_dictionary(found[0]) else found[0]
        if any(is_text(kind) for is_text in _TEXT_TYPES):
            return
    raise ValueError(
        f"text_key ({text_key}) must be a column of strings in {file}; it has "
        f"{', '.join(f'{field.name} ({field.type})' for field in schema)}."
    )

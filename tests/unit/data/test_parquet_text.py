"""Text comes out of every kind of parquet column that may hold it."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_dllm.data.parquet_text import read_text_column

TEXTS = ["one\nline two", "", None, "größe 字", "one\nline two"]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.binary_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
        pyarrow.dictionary(pyarrow.int16(), pyarrow.binary()),
    ],
    ids=str,
)
def test_every_type_of_text(tmp_path: Path, kind: pyarrow.DataType) -> None:
    expected = [None if text is None else text.encode() for text in TEXTS]
    is_dictionary = pyarrow.types.is_dictionary(kind)
    column = pyarrow.array(expected, pyarrow.binary()).cast(kind.value_type if is_dictionary else kind)
    column = column.dictionary_encode() if is_dictionary else column
    parquet.write_table(pyarrow.table({"n": range(5), "text": column}), tmp_path / "a.parquet", row_group_size=3)
    found = list(read_text_column(tmp_path / "a.parquet", "text", 2))
    assert [value for value, _ in found] == expected
    assert [share for _, share in found] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    "table",
    [
        pyarrow.table({"text": [1, 2]}),
        pyarrow.table({"text": [["a"], ["b"]]}),
        pyarrow.table({"text": pyarrow.array([1, 1]).dictionary_encode()}),
        pyarrow.table({"other": ["a", "b"]}),
        pyarrow.table([["a"], ["b"]], names=["text", "text"]),
    ],
    ids=["numbers", "lists", "dictionary_of_numbers", "no_such_column", "two_columns_of_that_name"],
)
def test_columns_that_hold_no_text(tmp_path: Path, table: pyarrow.Table) -> None:
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"text_key \(text\) must be a column of strings in .*a\.parquet; it has \w+ \("
    ):
        list(read_text_column(tmp_path / "a.parquet", "text", 2))


@pytest.mark.parametrize("damage", ["cut", "header", "pages", "empty"])
def test_damage_is_one_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [str(n) * 20 for n in range(3000)]}), path, compression="snappy")
    content = bytearray(path.read_bytes())
    if damage == "pages":
        content[4:3000] = b"\xff" * 2996
    changed = {"cut": content[:-10], "header": b"PAR1 and no more", "pages": content, "empty": b""}[damage]
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"input \(.*a\.parquet\) is not a readable parquet file: "):
        list(read_text_column(path, "text", 256))

"""Formats of the files that documents are read from, told by their names in any mixture of cases."""

from __future__ import annotations

from enum import Enum

from megatron_dllm.data.decompression import COMPRESSIONS


class Layout(Enum):
    """How documents lie in a file."""

    TEXT = "the whole file is one document"
    LINES = "a JSON object a line"
    JSON = "an array of JSON objects, JSON lines under a name of their own, or a single object"
    PARQUET = "a row each, the text in a column"


EXTENSIONS = {
    ".txt": Layout.TEXT,
    ".md": Layout.TEXT,
    ".jsonl": Layout.LINES,
    ".ndjson": Layout.LINES,
    ".jsonlines": Layout.LINES,
    ".json": Layout.JSON,
    ".parquet": Layout.PARQUET,
}
KNOWN = f"{' '.join(EXTENSIONS)} (all but parquet also with {' '.join(COMPRESSIONS)})"


def layout_of(name: str) -> Layout | None:
    """How documents lie in a file called `name`; None where its extension is not known."""
    name = name.lower()
    packed = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    name = name.removesuffix(packed)
    layout = next((layout for ending, layout in EXTENSIONS.items() if name.endswith(ending)), None)
    return None if packed and layout is Layout.PARQUET else layout  # parquet is read from its end

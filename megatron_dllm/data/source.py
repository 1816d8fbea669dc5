"""What rows are made of: documents as tokens, spans and sample ids, whatever they were read from.

Text, conversations, preference pairs, rollouts and evaluation requests are sources. Packing plans rows from lengths
and spans alone; tokens are read when a row is built. `data.corpus.Corpus` is the one on disk.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.spans import Spans, SpanTable


class Documents(Protocol):
    """What the segments of a planned row are read from: a source, or a blend of several."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""

    @property
    def spans(self) -> SpanTable | None:
        """Which tokens of every document may carry a loss; None: all of them."""

    def read(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """[length] int64 tokens of a document from `offset` on."""

    def sample_id(self, document: int, offset: int) -> int:
        """A number, at least 0, that no other segment has: the noise of the segment follows from it."""


class Source(Documents, Protocol):
    """Documents, in an order of their own; they do not change while they are read."""

    @property
    def document_lengths(self) -> NDArray[Any]:
        """[d] integer tokens of every document, often memory-mapped."""

    @property
    def spans(self) -> Spans | None:
        """Which tokens of every document may carry a loss; None: all of them."""

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of the text they came from, where that is known: bits per byte follow from it."""

    @property
    def fingerprint(self) -> str:
        """What tells this content from any other: a run goes on with the same one."""

    @property
    def chat_template(self) -> str | None:
        """SHA-256 of the template that rendered the chats; None for other documents."""

    @property
    def is_paired(self) -> bool:
        """Whether documents 2i and 2i + 1 are the answers that were chosen and rejected, see `data.preference`."""

    def verify(self) -> None:
        """Raise ValueError where what is read would be damaged; on one rank, before a run starts."""


def check_fills_a_row(source: Documents, geometry: RowGeometry) -> None:
    """Raise ValueError where the whole source, with all its copies, would not fill one row."""
    has_clean = geometry.objective == "ar" or geometry.block_size < geometry.context_length
    copies = geometry.num_views + has_clean
    if source.num_tokens * copies < geometry.row_length:
        raise ValueError(
            f"corpus {source.name} ({source.num_tokens} tokens) must hold more than one row of "
            f"{geometry.row_length} tokens ({copies} copies of each); give more text or a smaller row_length."
        )

"""Documents that lie in memory: requests of an evaluation, texts of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.spans import Spans

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class MemorySource:
    """A source (`data.source`) of given tokens.

    Attributes:
        documents: tokens of each.
        first_ids: sample id of each document's first token; the others count on from it.
        spans: which tokens may carry a loss; None: all of them.
        num_bytes: UTF-8 bytes of the text they came from, where that is known.
    """

    documents: Sequence[Sequence[int]]
    first_ids: Sequence[int]
    spans: Spans | None = None
    num_bytes: int | None = None
    name: str = "requests"
    fingerprint: str = "requests"
    chat_template: str | None = None
    is_paired: bool = False

    @classmethod
    def of_texts(cls, documents: Sequence[Sequence[int]]) -> MemorySource:
        """Plain text with the sample ids that a corpus of the same documents gives them."""
        lengths = [len(document) for document in documents]
        return cls(documents, (np.cumsum([0, *lengths])[:-1]).tolist(), name="texts")

    @cached_property
    def document_lengths(self) -> IntArray:
        """[d] int64 tokens of every document."""
        return np.array([len(document) for document in self.documents], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self.document_lengths.sum())

    def read(self, document: int, offset: int, length: int) -> IntArray:
        """[length] int64 tokens of a document from `offset` on."""
        return np.array(self.documents[document][offset : offset + length], dtype=np.int64)

    def sample_id(self, document: int, offset: int) -> int:
        """A number that no other segment has."""
        return self.first_ids[document] + offset

    def verify(self) -> None:
        """Nothing that lies in memory is damaged."""

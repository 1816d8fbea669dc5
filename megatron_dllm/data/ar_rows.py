"""AR rows among the noisy ones of a stage: the same documents as a source of their own.

In a blend they count as a corpus: they have a share of the document tokens, a position and epochs of their own, their
own order of the documents, and sample ids that no other corpus has. A row of theirs holds each document once, its clean
tokens alone, whatever the stage's other rows hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.source import Source
from megatron_dllm.data.spans import Spans


@dataclass(frozen=True)
class ArRows:
    """The documents of a source, for AR rows.

    Attributes:
        source: of the documents.
    """

    source: Source

    @property
    def name(self) -> str:
        """That of the source, and that these are AR rows."""
        return f"{self.source.name}.ar"

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return self.source.num_tokens

    @property
    def document_lengths(self) -> NDArray[Any]:
        """[d] integer tokens of every document."""
        return self.source.document_lengths

    @property
    def spans(self) -> Spans | None:
        """Which tokens of every document may carry a loss; None: all of them."""
        return self.source.spans

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of the text they came from, where that is known."""
        return self.source.num_bytes

    @property
    def fingerprint(self) -> str:
        """That of the content, and that these are AR rows."""
        return f"{self.source.fingerprint}.ar"

    @property
    def chat_template(self) -> str | None:
        """SHA-256 of the template that rendered the chats; None for other documents."""
        return self.source.chat_template

    @property
    def is_paired(self) -> bool:
        """Whether documents 2i and 2i + 1 are the answers of a pair."""
        return self.source.is_paired

    def read(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """[length] int64 tokens of a document from `offset` on."""
        return self.source.read(document, offset, length)

    def sample_id(self, document: int, offset: int) -> int:
        """That of the source; a blend keeps those of its corpora apart."""
        return self.source.sample_id(document, offset)

    def verify(self) -> None:
        """Raise ValueError where what is read would be damaged."""
        self.source.verify()

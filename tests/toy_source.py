"""Documents that a formula writes: a source that reads nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_DOCUMENTS = 60
FIRST_ID, NUM_IDS = 3, 100
_LONGEST = 1000


def token_of(document: int, place: int) -> int:
    """The token at a place of a document."""
    return FIRST_ID + (7 * document + 3 * place + place * place) % NUM_IDS


class ToySource:
    """Documents of 5 to 39 tokens."""

    name = "toy"
    spans = None
    num_bytes = None
    fingerprint = "toy"
    chat_template = None
    is_paired = False

    def __init__(self) -> None:
        self.document_lengths: NDArray[np.int32] = np.array(
            [5 + (11 * document) % 35 for document in range(NUM_DOCUMENTS)], dtype=np.int32
        )
        self.num_tokens = int(self.document_lengths.sum())

    def verify(self) -> None:
        """Nothing can be damaged."""

    def read(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """[length] int64 tokens from `offset` on."""
        return np.array([token_of(document, offset + place) for place in range(length)], dtype=np.int64)

    def sample_id(self, document: int, offset: int) -> int:
        """Document and place, told apart again by `place_of`."""
        return _LONGEST * document + offset


def place_of(sample_id: int) -> tuple[int, int]:
    """Document and offset of a segment."""
    return divmod(sample_id, _LONGEST)

"""Sources made up in memory, for blends: documents of one length or of random ones, each token saying whose it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dllm.data.spans import MASKABLE, Spans


@dataclass(frozen=True)
class MadeSource:
    """Documents of 1 to 2 x `mean` tokens; every token is `token`. `answers` leaves the loss to their second half."""

    name: str
    token: int
    num_documents: int
    mean: int = 30
    answers: bool = False
    num_bytes: None = None
    chat_template: None = None
    is_paired: bool = False

    @property
    def fingerprint(self) -> str:
        return f"of {self.name}"

    @property
    def document_lengths(self) -> np.ndarray:
        return np.random.default_rng(self.token).integers(1, 2 * self.mean, self.num_documents).astype(np.int32)

    @property
    def num_tokens(self) -> int:
        return int(self.document_lengths.sum())

    @property
    def spans(self) -> Spans | None:
        lengths = self.document_lengths.tolist()
        return Spans.of_lists([[(n // 2, n, MASKABLE)] for n in lengths]) if self.answers else None

    def verify(self) -> None:
        pass

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        assert 0 <= document < self.num_documents and offset + length <= self.document_lengths[document]
        return np.full(length, self.token)

    def sample_id(self, document: int, offset: int) -> int:
        return 1000 * document + offset

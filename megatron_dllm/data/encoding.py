"""What a worker process does with raw documents: it turns them into tokens, and says which were bad."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.reading import BadDocumentError, RawDocument, decode_document
from megatron_dllm.data.spans import Spans
from megatron_dllm.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class EncodedBatch:
    """The documents of a batch as tokens.

    Attributes:
        tokens: [n] int32 of all documents, one after the other.
        lengths: [d] tokens of every document.
        num_bytes: UTF-8 bytes of their text.
        num_empty: documents without text, left out.
        bad: `source: reason` of every document that could not be read.
        spans: of every document, with an int32 table; None for plain text.
        tally: further counts by name, of a kind of data that has some.
    """

    tokens: NDArray[np.int32]
    lengths: list[int]
    num_bytes: int
    num_empty: int
    bad: list[str]
    spans: Spans | None = None
    tally: dict[str, int] = field(default_factory=dict)


class Encoder(Protocol):
    """Turns raw documents of one kind into tokens."""

    def encode(self, documents: list[RawDocument]) -> EncodedBatch:
        """Tokens of the documents, in their order; what is empty or bad is left out and counted."""


class Encoding(Protocol):
    """What an encoder is made of, small enough to be handed to worker processes."""

    def load(self) -> Encoder:
        """Read the tokenizer."""


@dataclass(frozen=True)
class TextEncoding:
    """Plain text; every document ends in the tokenizer's end-of-text token.

    Attributes:
        folder: of the tokenizer.
        text_key: key that holds the text.
    """

    folder: str
    text_key: str

    def load(self) -> TextEncoder:
        """Read the tokenizer."""
        return TextEncoder(TextTokenizer.load(self.folder), self.text_key)


@dataclass(frozen=True)
class TextEncoder:
    """The encoder of plain text."""

    tokenizer: TextTokenizer
    text_key: str

    def encode(self, documents: list[RawDocument]) -> EncodedBatch:
        """Decode and tokenize documents; empty and bad ones are left out and counted."""
        texts, bad, num_empty = [], [], 0
        for document in documents:
            try:
                text = decode_document(document, self.text_key)
            except BadDocumentError as error:
                bad.append(f"{document.source}: {error}")
                continue
            if text:
                texts.append(text)
            else:
                num_empty += 1
        encoded = [[*ids, self.tokenizer.eos_token_id] for ids in self.tokenizer.encode(texts)]
        num_bytes = sum(len(text.encode("utf-8")) for text in texts)
        return EncodedBatch(join_tokens(encoded), [len(ids) for ids in encoded], num_bytes, num_empty, bad)


def join_tokens(documents: list[list[int]]) -> NDArray[np.int32]:
    """[n] int32 tokens of all documents, one after the other."""
    return np.concatenate([np.zeros(0, np.int32), *[np.array(ids, np.int32) for ids in documents]])


def join_spans(parts: list[Spans]) -> Spans:
    """The spans of the documents of all parts, one part after the other."""
    counts = [np.diff(part.bounds) for part in parts]
    bounds = np.concatenate([np.zeros(1, np.int64), *counts]).cumsum()
    return Spans(bounds, np.concatenate([np.zeros((0, 3), np.int32), *[part.table for part in parts]]))

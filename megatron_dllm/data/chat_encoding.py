"""Raw documents that are chats into tokens and spans, for the processes that tokenize."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_dllm.data.chat import chat_of
from megatron_dllm.data.chat_template import ChatDocument, ChatTemplate
from megatron_dllm.data.encoding import EncodedBatch, join_tokens
from megatron_dllm.data.reading import BadDocumentError, RawDocument, decode_record
from megatron_dllm.data.spans import MASKABLE, MASKED, Spans
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles

Overlong = Literal["drop", "truncate"]
OVERLONG: tuple[Overlong, ...] = ("drop", "truncate")


@dataclass(frozen=True)
class ChatEncoding:
    """How chats become documents.

    Attributes:
        folder: of the tokenizer, with a chat template.
        max_length: most tokens of a document; None: any number.
        overlong: what happens to a longer one. `drop` leaves it out; `truncate` keeps its beginning, whose last token
            is of kind MASKED: a document that ends in a maskable token ends with the end of a turn.
    """

    folder: str
    max_length: int | None = None
    overlong: Overlong = "drop"

    kind = "chat"
    plural = "chats"

    def validate(self) -> None:
        """Raise ValueError for settings that cannot work."""
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length ({self.max_length}) must be at least 2, a prompt and an answer.")
        if self.overlong not in OVERLONG:
            raise ValueError(f"overlong ({self.overlong}) must be one of {', '.join(OVERLONG)}.")

    def load(self) -> ChatEncoder:
        """Read the tokenizer and its template."""
        return ChatEncoder(ChatTemplate.load(self.folder), self)

    def left_out(self, tally: Mapping[str, int]) -> str:
        """How many documents were dropped and why, for a message."""
        return f"{tally['num_overlong_dropped']} were longer than max_length"


@dataclass(frozen=True)
class ChatEncoder:
    """The encoder of chats."""

    template: ChatTemplate
    settings: ChatEncoding

    def encode(self, documents: list[RawDocument]) -> EncodedBatch:
        """Tokens and spans of the chats; bad ones are left out, each with its reason."""
        encoded: list[ChatDocument] = []
        bad: list[str] = []
        tally: Counter[str] = Counter()
        for document in documents:
            try:
                encoded += self._fit(self.documents(document), tally)
            except BadDocumentError as error:
                bad.append(f"{document.source}: {error}")
        return batch_of(encoded, bad, tally)

    def documents(self, document: RawDocument) -> list[ChatDocument]:
        """The documents that one chat becomes, however long they are.

        Raises:
            BadDocumentError: it is no chat, or cannot be rendered.
        """
        return self.template.documents(chat_of(decode_record(document)))

    @property
    def fill(self) -> str:
        """The token that fills up an answer's last block, as text: the one that ends a document."""
        eos = TokenizerFiles(Path(self.template.folder)).eos_id()
        return self.decode([eos]) if eos is not None else "end of text"

    def title(self, number: int, total: int) -> str:
        """What the document with a number, from 1, of the documents of one chat is called."""
        return f"document {number} of {total}"

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones included."""
        text: str = self.template.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _fit(self, documents: list[ChatDocument], tally: Counter[str]) -> list[ChatDocument]:
        """Those that are short enough, or were made so; counts what happened."""
        tally["num_chats"] += 1
        tally["num_split_chats"] += len(documents) > 1
        fitted = []
        for document in documents:
            if self.settings.max_length is None or len(document.ids) <= self.settings.max_length:
                fitted.append(document)
                continue
            is_dropped = self.settings.overlong == "drop"
            shorter = None if is_dropped else self._truncate(document, self.settings.max_length)
            if shorter is None:
                tally["num_overlong_dropped"] += 1
            else:
                tally["num_overlong_truncated"] += 1
                fitted.append(shorter)
        return fitted

    def _truncate(self, document: ChatDocument, max_length: int) -> ChatDocument | None:
        """The beginning of a document; None where nothing of an answer is left in it."""
        ids, last = document.ids[:max_length], max_length - 1
        spans = [(start, min(stop, last), kind) for start, stop, kind in document.spans if start < last]
        text = self.decode(ids)
        return ChatDocument(ids, [*spans, (last, max_length, MASKED)], text) if spans else None


def batch_of(documents: list[ChatDocument], bad: list[str], tally: Counter[str]) -> EncodedBatch:
    """Documents as one batch, with what is counted of them."""
    tally["num_supervised_tokens"] = sum(
        stop - start for document in documents for start, stop, kind in document.spans if kind == MASKABLE
    )
    spans = Spans.of_lists([document.spans for document in documents])
    return EncodedBatch(
        tokens=join_tokens([document.ids for document in documents]),
        lengths=[len(document.ids) for document in documents],
        num_bytes=sum(len(document.text.encode("utf-8")) for document in documents),
        num_empty=0,
        bad=bad,
        spans=Spans(spans.bounds, spans.table.astype(np.int32)),
        tally=dict(tally),
    )

"""Raw documents that are preference pairs into tokens and spans: two documents each, see `data.preference`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dllm.data.chat_encoding import ChatEncoder, ChatEncoding, Overlong, batch_of
from megatron_dllm.data.chat_template import ChatDocument
from megatron_dllm.data.encoding import EncodedBatch
from megatron_dllm.data.pair import EmptyAnswerError, pair_of
from megatron_dllm.data.preference import PAIRS, SIDES
from megatron_dllm.data.reading import BadDocumentError, RawDocument, decode_record


@dataclass(frozen=True)
class PairEncoding:
    """How pairs become documents.

    Attributes:
        folder: of the tokenizer, with a chat template.
        max_length: most tokens of a side; a pair with a longer one is dropped. None: any number.
    """

    folder: str
    max_length: int | None = None

    kind = PAIRS
    plural = "pairs"
    overlong: Overlong = "drop"

    def validate(self) -> None:
        """Raise ValueError for settings that cannot work."""
        ChatEncoding(self.folder, self.max_length).validate()

    def load(self) -> PairEncoder:
        """Read the tokenizer and its template."""
        return PairEncoder(ChatEncoding(self.folder).load(), self.max_length)

    def left_out(self, tally: Mapping[str, int]) -> str:
        """How many pairs were dropped and why, for a message."""
        return (
            f"{tally['num_overlong_dropped']} were longer than max_length, {tally['num_equal_dropped']} had two equal "
            f"answers, {tally['num_empty_dropped']} an empty one"
        )


@dataclass(frozen=True)
class PairEncoder:
    """The encoder of pairs.

    Attributes:
        chats: renders each side, of which the last answer alone carries a loss.
        max_length: as of `PairEncoding`.
    """

    chats: ChatEncoder
    max_length: int | None

    def encode(self, documents: list[RawDocument]) -> EncodedBatch:
        """Tokens and spans of the pairs, chosen side first; bad ones are left out, each with its reason."""
        encoded: list[ChatDocument] = []
        bad: list[str] = []
        tally: Counter[str] = Counter(num_pairs=0)
        for document in documents:
            try:
                sides = self.documents(document)
            except EmptyAnswerError:
                tally.update(["num_pairs", "num_empty_dropped"])
                continue
            except BadDocumentError as error:
                bad.append(f"{document.source}: {error}")
                continue
            tally["num_pairs"] += 1
            dropped = self._why_dropped(sides)
            if dropped is not None:
                tally[dropped] += 1
                continue
            encoded += sides
            for name, side in zip(SIDES, sides, strict=True):
                tally[f"num_{name}_tokens"] += sum(stop - start for start, stop, _ in side.spans)
        return batch_of(encoded, bad, tally)

    def documents(self, document: RawDocument) -> list[ChatDocument]:
        """Both sides of one pair, however long they are.

        Raises:
            BadDocumentError: it is no pair, or cannot be rendered.
        """
        pair = pair_of(decode_record(document))
        return [self.chats.template.last_answer(side) for side in (pair.chosen, pair.rejected)]

    @property
    def fill(self) -> str:
        """The token that fills up an answer's last block, as text."""
        return self.chats.fill

    def title(self, number: int, total: int) -> str:
        """What document `number` of a pair's two is called."""
        assert total == len(SIDES), f"a pair of {total} documents"
        return SIDES[number - 1]

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones included."""
        return self.chats.decode(ids)

    def _why_dropped(self, sides: list[ChatDocument]) -> str | None:
        """What a pair is counted under that is not used."""
        if sides[0].ids == sides[1].ids:
            return "num_equal_dropped"
        is_overlong = self.max_length is not None and max(len(side.ids) for side in sides) > self.max_length
        return "num_overlong_dropped" if is_overlong else None


TemplateEncoding = ChatEncoding | PairEncoding
TemplateEncoder = ChatEncoder | PairEncoder

"""Several sources as one: every corpus of a run has a number, which its documents and sample ids carry.

    document d of corpus c        c x 2^40 + d
    its sample ids, its ordinals  c x 2^48 + its own, c x 2^40 + its own

So the noise of two corpora never collides, a row plan says by itself where its tokens lie, and corpus 0 is what it
would be alone. The number stays with a corpus for the whole run, whatever else is added or taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.source import Source
from megatron_dllm.data.spans import Spans

_DOCUMENT_BITS, _SAMPLE_BITS = 40, 48


def first_number(corpus: int) -> int:
    """What the documents and ordinals of a corpus begin at."""
    return corpus << _DOCUMENT_BITS


@dataclass(frozen=True)
class BlendSpans:
    """The spans of those corpora that have any.

    Attributes:
        sources: by number.
    """

    sources: Mapping[int, Source]

    def take(self, documents: NDArray[np.int64]) -> Spans | None:
        """The spans of some documents of one corpus; None where it is plain text.

        Args:
            documents: [p] int64 as the blend numbers them; a row's, so all of one corpus.
        """
        if not len(documents):
            return None
        number = int(documents[0]) >> _DOCUMENT_BITS
        spans = self.sources[number].spans
        return None if spans is None else spans.take(documents - (number << _DOCUMENT_BITS))


@dataclass(frozen=True)
class Blend:
    """The documents of all corpora of a run.

    Attributes:
        sources: by number.
    """

    sources: Mapping[int, Source]

    @property
    def name(self) -> str:
        """Their names."""
        return ", ".join(source.name for source in self.sources.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return sum(source.num_tokens for source in self.sources.values())

    @property
    def spans(self) -> BlendSpans | None:
        """Which tokens may carry a loss; None where all of them may, in every corpus."""
        has_spans = any(source.spans is not None for source in self.sources.values())
        return BlendSpans(self.sources) if has_spans else None

    def read(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """[length] int64 tokens of a document from `offset` on."""
        number, own = divmod(document, 1 << _DOCUMENT_BITS)
        return self.sources[number].read(own, offset, length)

    def sample_id(self, document: int, offset: int) -> int:
        """A number that no other segment of any corpus has."""
        number, own = divmod(document, 1 << _DOCUMENT_BITS)
        return (number << _SAMPLE_BITS) + self.sources[number].sample_id(own, offset)

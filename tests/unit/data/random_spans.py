"""Random spans for tests, and the plain reading of them that the code is compared with."""

from __future__ import annotations

import numpy as np

from megatron_dllm.data.spans import MASKABLE, MASKED, Spans


def random_spans(lengths: list[int], seed: int = 0, share: float = 0.2) -> Spans:
    """Spans of both kinds, some side by side, some documents without any."""
    rng = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        cuts = np.flatnonzero(np.append(rng.random(length) < share, True))
        parts = zip([0, *cuts[:-1].tolist()], cuts.tolist(), strict=True)
        kinds = rng.choice([0, MASKABLE, MASKED], len(cuts), p=[0.6, 0.3, 0.1])
        documents.append([(a, b, int(k)) for (a, b), k in zip(parts, kinds, strict=True) if k and a < b])
    return Spans.of_lists(documents)


def expected_kinds(spans: Spans, document: int, length: int) -> list[int]:
    """The kind of every token of a document."""
    kinds = [0] * length
    for start, stop, kind in spans.table[spans.bounds[document] : spans.bounds[document + 1]].tolist():
        kinds[start:stop] = [kind] * (stop - start)
    return kinds

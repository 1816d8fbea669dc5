"""The global sequence of rows of a blend: each row comes from one corpus, the one whose share is furthest behind.

Every corpus has a sequence of its own (`data.packing.RowStream`), with its own order of documents and its own epochs.
With weights w and t tokens emitted of each corpus, T of all, the next row is of the corpus whose w T - t is largest. So
the realised shares are within one row of the weights at any time, no random number is drawn, and the position is the
position in each corpus and the tokens so far.

    weights 0.5, 0.3, 0.2 and rows of equal length:   0 1 2 0 0 1 0 1 2 0 ...

AR rows among noisy ones are a corpus of their own (`data.ar_rows`), whose rows are planned under the geometry of AR.
A global batch of preference pairs (`data.pair_packing`) is of one corpus: there the shares are within one batch.

The sequence is a pure function of the seed and of the weights of the stages so far. A blend of one corpus is the
corpus's own sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_dllm.data.ar_rows import ArRows
from megatron_dllm.data.blend import Blend, first_number
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import LENGTH, RowPlan, RowStream
from megatron_dllm.data.shuffle import mix_key
from megatron_dllm.data.source import Source


class BlendStream:
    """The global sequence of rows of several corpora, from any position on.

    Args:
        sources: the corpora, told apart by their fingerprints; those that a position to be loaded does not know get the
            next numbers, in this order.
        seed: of the run.
        chunk: documents that are packed together.
        is_repeating: a corpus that has been read through begins its next epoch; false: that is an error.

    Raises:
        ValueError: two of the corpora have the same content.
    """

    def __init__(self, sources: Sequence[Source], seed: int, chunk: int, is_repeating: bool = True) -> None:
        self._sources = {source.fingerprint: source for source in sources}
        if len(self._sources) < len(sources):
            names = [source.name for source in sources]
            raise ValueError(
                f"data.train: two of the corpora ({', '.join(names)}) have the same content; name it once."
            )
        self._seed, self._chunk, self._is_repeating = seed, chunk, is_repeating
        self._corpora: list[dict[str, Any]] = []  # by number: name, fingerprint, and the position of one not opened
        self._streams: dict[int, RowStream] = {}
        self._blends: list[dict[str, list[Any]]] = []  # weights, and tokens under them, by number; the last one counts
        # Of the blend that counts: number and weight of its corpora, their tokens, and all of these.
        self._weighted: list[tuple[int, float]] = []
        self._tokens: list[int] = []
        self._total = 0
        self._open([])

    @property
    def documents(self) -> Blend:
        """What the rows' documents are read from."""
        return Blend({number: self._source(number) for number in self._streams})

    def use(self, weights: Mapping[str, float]) -> None:
        """Take the next rows by these weights; the same weights again change nothing.

        Args:
            weights: shares of document tokens by fingerprint, of corpora that are open; the others get none.
        """
        assert weights and not weights.keys() - self._sources.keys(), f"weights of {list(weights)}"
        by_number = [weights.get(corpus["fingerprint"], 0.0) for corpus in self._corpora]
        if not self._blends or self._blends[-1]["weights"] != by_number:
            self._blends.append({"weights": by_number, "tokens": [0] * len(by_number)})
            self._begin_blend()

    def next(self, geometry: RowGeometry) -> RowPlan:
        """The next row of the sequence, under `geometry`.

        Raises:
            ValueError: no document of the corpus in turn holds a token that may carry a loss, or the corpus has been
                read through and is not to be repeated.
        """
        number = self._next_number(geometry)
        is_ar = isinstance(self._source(number), ArRows)
        plan = self._streams[number].next(geometry.ar_rows() if is_ar else geometry)
        if is_ar:
            plan = replace(plan, is_ar=True)
        if plan.epoch and not self._is_repeating:
            raise ValueError(
                f"corpus {self._source(number).name} has been read through, and data.on_exhausted (refuse) allows no "
                "second epoch; give it a smaller weight, more text, or data.on_exhausted=repeat."
            )
        # A list is quicker than numpy for a few segments, and this runs once a row on every rank.
        num_tokens = sum(plan.segments[:, LENGTH].tolist())
        self._tokens[number] += num_tokens
        self._total += num_tokens
        return plan

    def state_dict(self) -> dict[str, Any]:
        """The position as plain numbers, fit for JSON, with all blends of the run so far."""
        corpora = [dict(corpus) for corpus in self._corpora]
        for number, stream in self._streams.items():
            corpora[number]["position"] = stream.state_dict()
        return {"corpora": corpora, "blends": [{name: list(v) for name, v in b.items()} for b in self._blends]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the last row that was emitted before `state_dict` was called.

        Args:
            state: of a blend; or of the one corpus of a run, as earlier versions wrote it.

        Raises:
            ValueError: where a position belongs to another corpus, seed or chunk.
        """
        if "corpora" not in state:
            first = next(iter(self._sources.values()))
            known = {"name": first.name, "fingerprint": first.fingerprint, "position": dict(state)}
            state = {"corpora": [known], "blends": [{"weights": [1.0], "tokens": [0]}]}
        self._open([dict(corpus) for corpus in state["corpora"]])
        self._blends = [{name: list(values) for name, values in blend.items()} for blend in state["blends"]]
        if self._blends:
            missing = len(self._corpora) - len(self._blends[-1]["weights"])
            self._blends[-1]["weights"] += [0.0] * missing
            self._blends[-1]["tokens"] += [0] * missing
            self._begin_blend()

    def copy(self) -> BlendStream:
        """An independent stream at the same position (the documents are shared)."""
        other = BlendStream(list(self._sources.values()), self._seed, self._chunk, self._is_repeating)
        other.load_state_dict(self.state_dict())
        return other

    def _source(self, number: int) -> Source:
        return self._sources[self._corpora[number]["fingerprint"]]

    def _begin_blend(self) -> None:
        """Take the last blend for the next rows."""
        blend = self._blends[-1]
        self._weighted = [(number, weight) for number, weight in enumerate(blend["weights"]) if weight]
        self._tokens, self._total = blend["tokens"], sum(blend["tokens"])

    def _next_number(self, geometry: RowGeometry) -> int:
        """The corpus whose batch of pairs is not over, else whose share is furthest behind; of equal ones the first."""
        assert self._weighted, "rows are asked for before weights are given"
        if len(self._weighted) == 1:
            return self._weighted[0][0]
        if geometry.rows_of_pairs is not None:
            for number, _ in self._weighted:
                if self._streams[number].is_within_batch(geometry):
                    return number
        tokens, total = self._tokens, self._total or 1
        found, most = -1, -math.inf
        for number, weight in self._weighted:
            behind = weight * total - tokens[number]
            if behind > most:
                found, most = number, behind
        return found

    def _open(self, known: list[dict[str, Any]]) -> None:
        """Give every corpus its number: known ones keep theirs, in order; new ones follow."""
        fingerprints = {corpus["fingerprint"] for corpus in known}
        new = [source for fingerprint, source in self._sources.items() if fingerprint not in fingerprints]
        self._corpora = [*known, *({"name": source.name, "fingerprint": source.fingerprint} for source in new)]
        self._streams = {}
        for number, corpus in enumerate(self._corpora):
            source = self._sources.get(corpus["fingerprint"])
            if source is None:
                continue
            seed = mix_key(self._seed, number) if number else self._seed
            stream = RowStream(
                source.document_lengths,
                seed,
                self._chunk,
                spans=source.spans,
                first_number=first_number(number),
                is_paired=source.is_paired,
            )
            if "position" in corpus:
                stream.load_state_dict(corpus.pop("position"))
            self._streams[number] = stream

"""Chats for tiny runs: random tokens in turns of log-normal length, with the spans of what the assistant says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.tiny_run import CONTEXT_LENGTH, MASK, VOCAB_SIZE
from megatron_dllm.data.spans import MASKABLE, MASKED, Spans
from megatron_dllm.data.spans_file import write_spans


def draw_chats(num_chats: int, seed: int = 0) -> tuple[list[np.ndarray], Spans]:
    """Chats of one to three questions and answers that fit the tiny context; one in eight was cut off at its end.

    Returns:
        [n] int64 tokens of each chat, and their spans.
    """
    rng = np.random.default_rng(seed)
    tokens, documents = [], []
    for chat in range(num_chats):
        spans: list[tuple[int, int, int]] = []
        length = 0
        for _ in range(rng.integers(1, 4)):
            question, answer = (int(x) for x in np.clip(rng.lognormal(np.log(4), 0.6, 2), 1, 12))
            if length + question + answer > CONTEXT_LENGTH:
                break
            spans.append((length + question, length + question + answer, MASKABLE))
            length += question + answer
        start, stop, _ = spans[-1]
        if chat % 8 == 0 and stop - start > 1:
            spans[-1:] = [(start, stop - 1, MASKABLE), (stop - 1, stop, MASKED)]
        tokens.append(rng.integers(MASK + 1, VOCAB_SIZE, length))
        documents.append(spans)
    return tokens, Spans.of_lists(documents)


def write_chats(prefix: Path, num_chats: int = 400, seed: int = 0) -> None:
    """A corpus of `draw_chats` with its spans."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokens, spans = draw_chats(num_chats, seed)
    builder = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=np.uint16)
    for chat in tokens:
        builder.add_document(chat.astype(np.uint16), [len(chat)])
    builder.finalize(str(prefix) + ".idx")
    write_spans(Path(str(prefix) + ".spans"), spans)

"""Chats and preference pairs for tiny runs: random tokens in turns of log-normal length, with the spans of answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.tiny_run import CONTEXT_LENGTH, MASK, VOCAB_SIZE
from megatron_dllm.data.preference import PAIRS
from megatron_dllm.data.spans import MASKABLE, MASKED, Spans
from megatron_dllm.data.spans_file import write_spans
from megatron_dllm.run.files import write_json


def draw_chats(num_chats: int, seed: int = 0) -> tuple[list[NDArray[np.int64]], Spans]:
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
    _write(prefix, *draw_chats(num_chats, seed))


def draw_pairs(num_pairs: int, seed: int = 0) -> tuple[list[NDArray[np.int64]], Spans]:
    """Pairs of answers to a question each, the chosen one first; they fit the tiny context.

    Returns:
        [n] int64 tokens of each side, and their spans.
    """
    rng = np.random.default_rng(seed)
    tokens, documents = [], []
    for _ in range(num_pairs):
        question, *answers = (int(x) for x in np.clip(rng.lognormal(np.log(6), 0.6, 3), 1, 15))
        prompt = rng.integers(MASK + 1, VOCAB_SIZE, question)
        for answer in answers:
            tokens.append(np.append(prompt, rng.integers(MASK + 1, VOCAB_SIZE, answer)))
            documents.append([(question, question + answer, MASKABLE)])
    return tokens, Spans.of_lists(documents)


def write_pairs(prefix: Path, num_pairs: int = 40, seed: int = 0) -> None:
    """A corpus of `draw_pairs` with its spans and its kind."""
    _write(prefix, *draw_pairs(num_pairs, seed))
    write_json(Path(f"{prefix}.json"), {"kind": PAIRS})


def _write(prefix: Path, tokens: list[NDArray[np.int64]], spans: Spans) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=np.uint16)
    for document in tokens:
        builder.add_document(document.astype(np.uint16), [len(document)])
    builder.finalize(str(prefix) + ".idx")
    write_spans(Path(str(prefix) + ".spans"), spans)

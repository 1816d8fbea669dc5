"""Documents in memory are read like those of a corpus."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_dllm.config import ModelConfig
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.memory_source import MemorySource
from tests.unit.data.conftest import random_documents


def test_texts_have_the_tokens_and_sample_ids_of_a_corpus(write_corpus: Callable[..., str], model: ModelConfig) -> None:
    documents = random_documents(12)
    expected = Corpus(write_corpus(documents), model)
    source = MemorySource.of_texts([[int(token) for token in document] for document in documents])
    assert source.document_lengths.tolist() == expected.document_lengths.tolist()
    assert (source.num_tokens, source.spans) == (expected.num_tokens, None)
    for number, length in enumerate(source.document_lengths.tolist()):
        assert source.sample_id(number, 1) == expected.sample_id(number, 1)
        assert np.array_equal(source.read(number, 1, length - 1), expected.read(number, 1, length - 1))
    source.verify()

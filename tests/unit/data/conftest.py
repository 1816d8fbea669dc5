"""A small corpus on disk, written with megatron's own builder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_dllm.config import ModelConfig

VOCAB_SIZE, EOS, PAD, MASK = 500, 0, 1, 2


@pytest.fixture
def model() -> ModelConfig:
    """A model whose vocabulary the corpus of `write_corpus` fits; only ids matter here."""
    return ModelConfig(vocab_size=VOCAB_SIZE, eos_token_id=EOS, pad_token_id=PAD, mask_token_id=MASK)


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., str]:
    """Write documents as PREFIX.bin, .idx and, with `description`, .json; returns the prefix."""

    def write(
        documents: list[list[int]], name: str = "corpus", dtype: type = np.uint16, description: dict | None = None
    ) -> str:
        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
        for document in documents:
            builder.add_document(np.array(document, dtype=dtype), [len(document)])
        builder.finalize(prefix + ".idx")
        if description is not None:
            Path(prefix + ".json").write_text(json.dumps(description))
        return prefix

    return write


def random_documents(num_documents: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Documents of 1..longest tokens that end in <eos>; no token equals the mask."""
    rng = np.random.default_rng(seed)
    return [[*rng.integers(MASK + 1, VOCAB_SIZE, rng.integers(0, longest)).tolist(), EOS] for _ in range(num_documents)]

"""What a validation was measured on and how, so that only like is compared with like."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import numpy as np

from megatron_dllm.checkpoint.validation import Conditions
from megatron_dllm.config import TrainConfig
from megatron_dllm.data.source import Source
from megatron_dllm.diffusion.noise import NoiseSpec

# Of the choice of documents, of their rows and of the noise.
SEED = 0


def conditions_of(config: TrainConfig, corpus: Source, num_tokens: int) -> Conditions:
    """The conditions of a measurement.

    Args:
        config: of the run that measures.
        corpus: held-out documents.
        num_tokens: document tokens that are measured.
    """
    blocks = config.data.block_origin
    if blocks == "row":  # then the rows decide which tokens share a block
        blocks += f" of {config.schedule.tokens_per_row} tokens, packed by {config.data.packing_chunk}"
    noise = {**asdict(NoiseSpec.for_validation()), "seed": SEED}
    return Conditions(
        corpus=corpus_fingerprint(corpus),
        num_tokens=num_tokens,
        context_length=config.schedule.context_length,
        blocks=blocks,
        noise=" ".join(f"{name}={value}" for name, value in noise.items()),
        precision=config.parallel.precision,
    )


def corpus_fingerprint(corpus: Source) -> str:
    """A text that differs where the documents' lengths, bytes or spans differ.

    The lengths of all documents in order are hashed, not their tokens, which would have to be read.
    """
    digest = hashlib.sha256(np.ascontiguousarray(corpus.document_lengths, dtype=np.int64).tobytes())
    digest.update(f"{corpus.num_bytes} {corpus.spans is not None}".encode())
    return f"lengths:{digest.hexdigest()[:16]}"

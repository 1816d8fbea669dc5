"""Rows that a stage would train on, without a corpus: documents that a formula writes, through the product's loader."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.config import StageConfig, TrainConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import BatchLoader, RowDataset
from megatron_dllm.data.packing import RowStream
from megatron_dllm.data.spans import MASKABLE, Spans
from megatron_dllm.model.objective import objective_of

NUM_DOCUMENTS = 64


@dataclass(frozen=True)
class FullDocuments:
    """Documents of one length, so that rows are as full as they get.

    Attributes:
        length: tokens of each.
        vocab_size: tokens lie below it.
        is_chat: the second half of every document is an answer, and nothing else carries a loss.
    """

    length: int
    vocab_size: int
    is_chat: bool = False
    name: str = "full documents"
    num_bytes: int | None = None
    fingerprint: str = "full documents"
    chat_template: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return NUM_DOCUMENTS * self.length

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """[d] int64 tokens of every document."""
        return np.full(NUM_DOCUMENTS, self.length, dtype=np.int64)

    @cached_property
    def spans(self) -> Spans | None:
        """The answers; None where every token may carry a loss."""
        if not self.is_chat:
            return None
        return Spans.of_lists([[(self.length // 2, self.length, MASKABLE)]] * NUM_DOCUMENTS)

    def verify(self) -> None:
        """Nothing can be damaged."""

    def read(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """[length] int64 tokens from `offset` on."""
        return (np.arange(offset, offset + length) + document) % self.vocab_size

    def sample_id(self, document: int, offset: int) -> int:
        """Document and place in one number."""
        return document * self.length + offset


def micro_batches(config: TrainConfig, stage: StageConfig, number: int) -> list[Batch]:
    """So many micro-batches of a stage, of documents as long as the context.

    Args:
        config: of the run.
        stage: whose geometry, noise and micro batch they have.
        number: of them.

    Returns:
        Whole rows, on the CPU.
    """
    length = config.schedule.context_length
    source = FullDocuments(length, config.model.vocab_size, is_chat=stage.sft is not None)
    dataset = RowDataset(
        source,
        RowGeometry.of_stage(stage, config.schedule, config.data),
        objective_of(stage, config.noise).noise,
        config.run.seed,
        config.model.mask_token_id,
        config.model.pad_token_id,
        config.model.eos_token_id,
    )
    loader = BatchLoader(
        dataset,
        RowStream(source.document_lengths, config.run.seed, config.data.packing_chunk, spans=source.spans),
        global_batch_size=number * stage.micro_batch_size,
        micro_batch_size=stage.micro_batch_size,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    return next(iter(loader)).micro_batches

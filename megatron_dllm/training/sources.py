"""The documents a run reads, each corpus opened once in a process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from megatron_dllm.config import TrainConfig
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.source import Source


def open_corpus(prefix: str, config: TrainConfig) -> Corpus:
    """The tokenized text at a prefix, compared with the run's model and tokenizer."""
    return Corpus(prefix, config.model, config.data.tokenizer)


class Sources:
    """Opens the training and the held-out documents when they are first asked for, and keeps them."""

    def __init__(self, config: TrainConfig, open_source: Callable[[str, TrainConfig], Source] = open_corpus) -> None:
        """Args: the run's configuration, and what opens the documents at a prefix."""
        self._config, self._open = config, open_source

    @cached_property
    def train(self) -> Source:
        """The training documents.

        Raises:
            ValueError: they cannot be read, or are of another model or tokenizer.
        """
        return self._open(self._config.data.train, self._config)

    @cached_property
    def validation(self) -> Source | None:
        """The held-out documents, or None where the run measures nothing.

        Raises:
            ValueError: as for the training documents.
        """
        prefix = self._config.data.validation
        return self._open(prefix, self._config) if prefix and self._config.evaluation.num_tokens else None

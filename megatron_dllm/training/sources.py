"""The documents a run reads, each corpus opened once in a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_dllm.config import TrainConfig
from megatron_dllm.data.ar_rows import ArRows
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.source import Source


def open_corpus(prefix: str, config: TrainConfig) -> Corpus:
    """The tokenized text at a prefix, compared with the run's model and tokenizer."""
    return Corpus(prefix, config.model, config.data.tokenizer)


@dataclass(frozen=True)
class Share:
    """One corpus of a stage, and its share of the document tokens."""

    source: Source
    share: float


class Sources:
    """Opens the training and the held-out documents when they are first asked for, and keeps them."""

    def __init__(self, config: TrainConfig, open_source: Callable[[str, TrainConfig], Source] = open_corpus) -> None:
        """Args: the run's configuration, and what opens the documents at a prefix."""
        self._config, self._open = config, open_source

    @cached_property
    def corpora(self) -> Mapping[str, Source]:
        """The training documents of all stages, by prefix.

        Raises:
            ValueError: they cannot be read, or are of another model or tokenizer.
        """
        return {prefix: self._open(prefix, self._config) for prefix in self._config.train_corpora}

    def of_stage(self, name: str) -> tuple[Share, ...]:
        """The training documents of a stage; those of its AR rows stand behind the others."""
        parts, share = self._config.blend_of(name), self._config.schedule.stages[name].ar_row_share
        noisy = tuple(Share(self.corpora[part.prefix], part.share * (1.0 - share)) for part in parts)
        return noisy + tuple(Share(self.ar_rows[part.prefix], part.share * share) for part in parts if share)

    @cached_property
    def ar_rows(self) -> Mapping[str, ArRows]:
        """By prefix, the documents that some stage also trains in AR rows."""
        stages = [name for name, stage in self._config.schedule.stages.items() if stage.ar_row_share]
        parts = [part for name in stages for part in self._config.blend_of(name)]
        return {part.prefix: ArRows(self.corpora[part.prefix]) for part in parts}

    def prompted_stages(self) -> list[str]:
        """Names of the stages with documents that say which of their tokens carry a loss."""
        stages = self._config.schedule.stages
        return [name for name in stages if any(part.source.spans is not None for part in self.of_stage(name))]

    @cached_property
    def validation(self) -> Source | None:
        """The held-out documents, or None where the run measures nothing.

        Raises:
            ValueError: as for the training documents.
        """
        prefix = self._config.data.validation
        return self._open(prefix, self._config) if prefix and self._config.evaluation.num_tokens else None

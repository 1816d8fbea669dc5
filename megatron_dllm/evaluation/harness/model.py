"""A loaded model as lm-evaluation-harness sees it.

Every rank holds one and is asked the same, so the harness knows of one process only: our own loader shares the rows out
over data-parallel ranks, and every rank hears all answers. Scores do not depend on the number of ranks, and all
model-parallel layouts work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_dllm.config.likelihood import LikelihoodConfig
from megatron_dllm.data.memory_source import MemorySource
from megatron_dllm.data.source import check_fills_a_row
from megatron_dllm.evaluation.continuations import Continuation
from megatron_dllm.evaluation.elbo import score_corpus, validation_geometry
from megatron_dllm.evaluation.harness.requests import Encoder, noise_key
from megatron_dllm.evaluation.harness.text_model import TextModel
from megatron_dllm.evaluation.harness.writing import Writer
from megatron_dllm.evaluation.likelihood import Likelihood, score_continuations
from megatron_dllm.evaluation.local_model import LocalModel


@dataclass(frozen=True)
class Scored:
    """A choice of a question, and its score.

    Attributes:
        task: name.
        question: its number in the task.
        has_context: false where the choice was scored by itself (mutual information).
    """

    task: str
    question: int
    has_context: bool
    likelihood: Likelihood


class HarnessModel(TextModel):
    """The model of `lm_eval.simple_evaluate`.

    Args:
        model: this rank's part.
        encoder: of the checkpoint's tokenizer.
        settings: of likelihoods.
        block_size: of the grid; None: the model is autoregressive.
        writer: writes texts; None: no task asks for any.
        greedy_tasks: names of tasks that ask whether the model would write a continuation.

    Attributes:
        scored: every choice so far.
    """

    def __init__(
        self,
        model: LocalModel,
        encoder: Encoder,
        settings: LikelihoodConfig,
        block_size: int | None,
        writer: Writer | None = None,
        greedy_tasks: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(encoder, writer)
        self._model, self._settings, self._block_size = model, settings, block_size
        self._greedy_tasks = greedy_tasks
        self.scored: list[Scored] = []

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return self._model.config.schedule.context_length

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The likelihood of every choice, in nats, and where a task asks for it whether the model would write it.

        Raises:
            ValueError: a choice without tokens, or one that does not fit the window with its context.
        """
        asked = [self._continuation(request) for request in requests]
        found = score_continuations(self._model, asked, self._settings, self._block_size)
        for request, likelihood in zip(requests, found, strict=True):
            self.scored.append(
                Scored(str(request.task_name), int(request.doc_id or 0), bool(request.args[0]), likelihood)
            )
        is_greedy = self._would_write(requests, asked)
        return [(likelihood.value, greedy) for likelihood, greedy in zip(found, is_greedy, strict=True)]

    def _would_write(self, requests: Sequence[Instance], asked: Sequence[Continuation]) -> list[bool]:
        """False where no task asks: it takes a decoding."""
        places = [place for place, request in enumerate(requests) if request.task_name in self._greedy_tasks]
        if not places:
            return [False] * len(asked)
        assert self._writer is not None, "a run with such a task has a writer"
        length, may_cut = self.max_length, self._settings.truncate
        found = self._writer.would_write([asked[place].fitted(length, may_cut) for place in places])
        by_place = dict(zip(places, found, strict=True))
        return [by_place.get(place, False) for place in range(len(asked))]

    def _continuation(self, request: Instance) -> Continuation:
        """A choice as the harness cuts it: spaces at the end of the context belong to the choice."""
        context, text = request.args
        name = f"task {request.task_name}, question {request.doc_id}, {text[:40]!r}"
        if context.strip():
            first, rest = self._encode_pair(context, text)
        else:
            first, rest = [self.prefix_token_id], self.tok_encode(context + text)
        key = noise_key(str(request.task_name), int(request.doc_id or 0))
        return Continuation(tuple(first), tuple(rest), key, name)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Scores of tokens; `loglikelihood` does more."""
        asked = [Continuation(tuple(context), tuple(tokens)) for _, context, tokens in requests]
        found = score_continuations(self._model, asked, self._settings, self._block_size)
        return [(likelihood.value, False) for likelihood in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The likelihood of whole documents, every token scored once.

        Under block diffusion a document is what a validation makes of it: its tokens and the one that ends it, in
        segments of the context length, with the rows and the noise of `megatron_dllm.evaluate`, whose number this is.
        An autoregressive model scores it behind the end-of-text token, as other models of the harness do.
        """
        texts = [str(request.args[0]) for request in requests]
        return self._rolling_exact(texts) if self._block_size is None else self._rolling_elbo(texts)

    def _rolling_elbo(self, texts: Sequence[str]) -> list[float]:
        source = MemorySource.of_texts([self._encoder.document(text) for text in texts])
        name, model = str(self._block_size), self._model
        check_fills_a_row(source, validation_geometry(model.config, name, shift=model.shift))
        sums = np.zeros(len(texts))
        bounds = np.append(source.first_ids, source.num_tokens)
        lengths = source.document_lengths
        where = (model.chunks, model.config, model.groups, source, lengths, name, model.device)
        for scores in score_corpus(*where, shift=model.shift, label="scoring documents"):
            documents = np.searchsorted(bounds, scores.sample_ids.numpy(), side="right") - 1
            np.add.at(sums, documents, scores.means.numpy())
        return [float(value) for value in sums]

    def _rolling_exact(self, texts: Sequence[str]) -> list[float]:
        asked, owners = [], []
        for number, text in enumerate(texts):
            for pair in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1):
                context, tokens = make_disjoint_window(pair)
                asked.append(Continuation(tuple(context), tuple(tokens), name=f"document {number}"))
                owners.append(number)
        sums = np.zeros(len(texts))
        found = score_continuations(self._model, asked, self._settings, None)
        np.add.at(sums, owners, [likelihood.value for likelihood in found])
        return [float(value) for value in sums]

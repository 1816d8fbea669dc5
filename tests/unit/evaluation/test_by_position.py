"""Stretches of positions cover each document once, and their costs add up to the document's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dllm.config import ParallelConfig, ScheduleConfig, TrainConfig
from megatron_dllm.config.likelihood import LikelihoodConfig
from megatron_dllm.config.needle import NeedleConfig
from megatron_dllm.data.memory_source import MemorySource
from megatron_dllm.evaluation.by_position import Stretch, by_position, stretches_of
from megatron_dllm.evaluation.continuations import Continuation
from megatron_dllm.evaluation.likelihood import Likelihood, score_continuations
from tests.reference_model import random_weights, tiny_model, to_megatron

CONTEXT = 32
DOCUMENTS = [[(7 * place + number) % 9 for place in range(length)] for number, length in enumerate((40, 8, 32, 33))]
SOURCE = MemorySource.of_texts(DOCUMENTS)


def _config(**changes: object) -> NeedleConfig:
    return NeedleConfig(schedule=ScheduleConfig(context_length=CONTEXT), **dict(num_documents=2) | changes)


def test_stretches_are_those_of_documents_that_fill_the_context() -> None:
    stretches = stretches_of(_config(stretch=12), SOURCE)
    assert [(len(item.context), len(item.tokens)) for item in stretches] == [(0, 12), (12, 12), (24, 8)] * 2
    whole = {(*item.context, *item.tokens) for item in stretches if len(item.tokens) == 8}
    assert len(whole) == 2
    assert whole <= {tuple(document[:CONTEXT]) for document in DOCUMENTS if len(document) >= CONTEXT}
    assert len(stretches_of(_config(num_documents=9), SOURCE)) == 3 * 8
    with pytest.raises(ValueError, match=r"data.validation \(texts\) must hold documents of at least .* \(32\) tokens"):
        stretches_of(_config(), MemorySource.of_texts([[1] * 31]))


def test_the_curve_is_the_mean_over_documents() -> None:
    asked = [Continuation((), (1, 2)), Continuation((1, 2), (3,)), Continuation((), (4, 5)), Continuation((4, 5), (6,))]
    found = [Likelihood((value,), True) for value in (-2.0, -7.0, -4.0, -9.0)]
    assert by_position(asked, found) == [
        Stretch(0, 2, 2, nats_per_token=1.5, standard_error=pytest.approx(0.5)),
        Stretch(2, 3, 2, nats_per_token=8.0, standard_error=pytest.approx(1.0)),
    ]
    assert by_position(asked[:1], found[:1]) == [Stretch(0, 2, 1, nats_per_token=1.0, standard_error=None)]


def test_costs_of_stretches_add_up_to_the_document_s(one_rank: Any) -> None:
    """At block size 1, and of an autoregressive model, every score is exact."""
    from megatron_dllm.evaluation.local_model import LocalModel
    from megatron_dllm.model.gpt import build_model

    sizes = tiny_model(vocab_size=12, mask_token_id=11, eos_token_id=10, pad_token_id=9)
    chunk = build_model(sizes, ParallelConfig(), one_rank)
    chunk.load_state_dict(to_megatron(sizes, random_weights(sizes)), strict=False)
    config = TrainConfig(model=sizes, schedule=ScheduleConfig(context_length=CONTEXT))
    model = LocalModel([chunk.eval()], config, one_rank, torch.device("cpu"))
    stretches = stretches_of(_config(num_documents=1, stretch=8), SOURCE)
    document = Continuation((), (*stretches[-1].context, *stretches[-1].tokens))
    for block_size in (1, None):
        curve = by_position(stretches, score_continuations(model, stretches, LikelihoodConfig(), block_size))
        (whole,) = score_continuations(model, [document], LikelihoodConfig(), block_size)
        total = sum(item.nats_per_token * (item.stop - item.start) for item in curve)
        assert total == pytest.approx(-whole.value, rel=1e-5)

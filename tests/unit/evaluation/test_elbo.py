"""Which held-out tokens a validation reads."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_dllm.evaluation.elbo import validation_lengths

LENGTHS = np.array([50, 7, 0, 90, 12], dtype=np.int32)


def _corpus(spans: Any = None) -> Any:
    return SimpleNamespace(document_lengths=LENGTHS, spans=spans)


@pytest.mark.parametrize("num_tokens", [1, 40, 100, 158])
def test_as_many_tokens_are_measured_as_asked_for(num_tokens: int) -> None:
    measured = validation_lengths(_corpus(), num_tokens)
    assert measured.sum() == num_tokens
    is_cut = (measured > 0) & (measured < LENGTHS)
    assert is_cut.sum() <= 1 and (measured <= LENGTHS).all()


def test_more_tokens_only_add_to_what_is_measured() -> None:
    steps = [validation_lengths(_corpus(), num_tokens) for num_tokens in range(170)]
    assert all((after >= before).all() for before, after in pairwise(steps))
    assert (steps[-1] == LENGTHS).all()


@pytest.mark.parametrize("num_tokens", [1, 40, 100])
def test_documents_with_spans_are_measured_whole(num_tokens: int) -> None:
    whole, cut = validation_lengths(_corpus(spans="some"), num_tokens), validation_lengths(_corpus(), num_tokens)
    assert (whole == np.where(cut > 0, LENGTHS, 0)).all()
    assert whole.sum() >= num_tokens

"""Decisions that are too close to call are counted by task."""

from __future__ import annotations

import pytest

from tests.conftest import NOT_RUN

pytest.importorskip("lm_eval", reason=f"{NOT_RUN}no lm-evaluation-harness here; pip install -e '.[eval]'")

from megatron_dllm.diffusion.generation import Generation
from megatron_dllm.evaluation.harness.model import Scored
from megatron_dllm.evaluation.harness.results import decisions, texts_of
from megatron_dllm.evaluation.likelihood import Likelihood

NEAR, FAR = Likelihood((-1.0, -2.0, -1.5), is_exact=False), Likelihood((-9.0, -9.5, -9.2), is_exact=False)
OTHER = Likelihood((-2.0, -1.0, -1.6), is_exact=False)


def test_unsure_decisions_are_named() -> None:
    scored = [Scored("a", 0, True, NEAR), Scored("a", 0, True, FAR), Scored("a", 1, True, NEAR)]
    scored += [Scored("a", 1, True, OTHER), Scored("a", 1, False, FAR), Scored("b", 0, True, NEAR)]
    found = decisions(scored)
    # A task of single continuations decides nothing.
    assert list(found) == ["a"] and (found["a"]["num_questions"], found["a"]["num_unsure"]) == (2, 1)
    (unsure,) = found["a"]["unsure"]
    assert unsure["question"] == 1 and unsure["gap"] == pytest.approx(0.1 / 3, rel=1e-6)


def test_texts_are_counted_by_task() -> None:
    one, two = Generation([1, 2, 3], "eos", [1, 1], 1, [1, 1, 2]), Generation([4], "stop", [2], 2, [1])
    found = texts_of([("a", one), ("b", two), ("a", two)])
    assert found["b"]["tokens_per_forward"] == 0.5 and found["b"]["num_texts"] == 1
    assert found["a"] == {
        "num_texts": 2,
        "num_tokens": 4,
        "num_denoising_forwards": 4,
        "num_commit_forwards": 3,
        "tokens_per_forward": 1.0,
        "tokens_per_forward_with_commits": 4 / 7,
    }

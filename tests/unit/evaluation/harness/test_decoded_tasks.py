"""Answers of tasks that a program can judge, by the filter that counts."""

from __future__ import annotations

import pytest

from megatron_dllm.diffusion.generation import Generation
from tests.conftest import NOT_RUN

pytest.importorskip("lm_eval", reason=f"{NOT_RUN}no lm-evaluation-harness here; pip install -e '.[eval]'")

from megatron_dllm.evaluation.harness.decoded_tasks import task_scores

# Two questions, of which a strict reading finds one answer and a lenient one both.
SAMPLES = {
    "sums": [
        {"filter": "strict", "metrics": ["exact_match"], "exact_match": 1.0},
        {"filter": "lenient", "metrics": ["exact_match"], "exact_match": 1.0},
        {"filter": "strict", "metrics": ["exact_match"], "exact_match": 0.0},
        {"filter": "lenient", "metrics": ["exact_match"], "exact_match": 1.0},
    ]
}


@pytest.mark.parametrize(("wanted", "num_right"), [("strict", 1), ("lenient", 2)])
def test_questions_are_counted_once_by_the_filter_that_was_chosen(wanted: str, num_right: int) -> None:
    texts: dict[str, list[Generation]] = {"sums": []}
    score = task_scores(SAMPLES, texts, {"sums": wanted})["sums"]
    assert (score.num_questions, score.num_right) == (2, num_right)


def test_a_metric_that_is_no_yes_or_no_is_refused() -> None:
    samples = {"sums": [{"filter": "none", "metrics": ["f1"], "f1": 0.5}]}
    with pytest.raises(ValueError, match=r"tasks \(sums\) has no metric that says right or wrong \(f1\)"):
        task_scores(samples, {"sums": []}, {"sums": "none"})

"""Scores of continuations against every mask counted by hand, with a model written in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, product
from math import comb, exp, sqrt
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import ParallelConfig, ScheduleConfig, StageConfig, TrainConfig
from megatron_dllm.config.likelihood import LikelihoodConfig
from megatron_dllm.evaluation.continuations import Continuation
from megatron_dllm.evaluation.likelihood import Decision, Likelihood, decide, score_continuations
from tests.reference_model import Weights, expected_logits, random_weights, tiny_model, to_megatron

pytestmark = pytest.mark.usefixtures("one_rank")

CONTEXT_LENGTH = 32
MODEL = tiny_model(vocab_size=12, mask_token_id=11, eos_token_id=10, pad_token_id=9)
CONTEXT, TOKENS = (3, 1, 4, 1, 5), (2, 6, 5, 3, 5)
Score = Callable[..., list[Likelihood]]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(MODEL)


@pytest.fixture(scope="module")
def score(one_rank: Any, weights: Weights) -> Score:
    """Scores continuations under settings; a pair is context and tokens."""
    from megatron_dllm.evaluation.local_model import LocalModel
    from megatron_dllm.model.gpt import build_model

    config = TrainConfig(model=MODEL, schedule=ScheduleConfig(context_length=CONTEXT_LENGTH))
    chunk = build_model(MODEL, ParallelConfig(), one_rank)
    chunk.load_state_dict(to_megatron(MODEL, weights), strict=False)
    model = LocalModel([chunk.eval()], config, one_rank, torch.device("cpu"))

    def score(
        asked: Sequence[Any], block_size: int | None, rows_at_a_time: int = 1, shift: bool = False, **settings: Any
    ) -> list[Likelihood]:
        made = [item if isinstance(item, Continuation) else Continuation(*item) for item in asked]
        found = LikelihoodConfig(**settings)
        found.validate()
        evaluation = replace(config.evaluation, micro_batch_size=rows_at_a_time)
        schedule = replace(config.schedule, stages={"only": StageConfig(shift=shift)})
        measured = replace(config, evaluation=evaluation, schedule=schedule)
        return score_continuations(replace(model, config=measured), made, found, block_size)

    return score


def _log_p(weights: Weights, ids: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """[s, v] log probabilities where every token sees its own block and earlier ones."""
    block = torch.tensor(blocks)
    mask = (block.unsqueeze(0) <= block.unsqueeze(1)).unsqueeze(0)
    logits = expected_logits(MODEL, weights, torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0), mask)
    return logits[0].log_softmax(-1)


def _expected(weights: Weights, context: Sequence[int], tokens: Sequence[int], size: int, fill: str = "mask") -> float:
    """The ELBO of all blocks: each mask of each block in a forward pass of its own."""
    ids, total = [*context, *tokens], 0.0
    if fill == "eos":
        ids += [MODEL.eos_token_id] * (-len(ids) % size)
    for first in range(len(context) // size * size, len(ids), size):
        last = min(first + size, len(ids))
        places = range(max(first, len(context)), last)
        behind = [MODEL.mask_token_id] * (first + size - last if fill == "mask" else 0)
        for count in range(1, len(places) + 1):
            for hidden in combinations(places, count):
                shown = [MODEL.mask_token_id if i in hidden else ids[i] for i in range(last)] + behind
                log_p = _log_p(weights, shown, [i // size for i in range(len(shown))])
                sure = sum(float(log_p[i, ids[i]]) for i in hidden)
                total += sure / (count * comb(len(places), count))
    return total


@pytest.mark.parametrize("fill", ["mask", "none", "eos"])
@pytest.mark.parametrize(("context", "size"), [(CONTEXT, 4), (CONTEXT[:4], 4), (CONTEXT[:1], 8), ((), 3)])
def test_exact_enumeration_is_every_mask_counted_once(
    context: tuple[int, ...], size: int, fill: str, score: Score, weights: Weights
) -> None:
    (found,) = score([(context, TOKENS)], size, estimator="exact", fill=fill)
    assert found.is_exact and found.standard_error == 0.0
    assert found.value == pytest.approx(_expected(weights, context, TOKENS, size, fill), rel=1e-5)


def test_block_size_1_is_the_sequential_nll(score: Score, weights: Weights) -> None:
    expected, ids = 0.0, [*CONTEXT, *TOKENS]
    for place in range(len(CONTEXT), len(ids)):
        log_p = _log_p(weights, [*ids[:place], MODEL.mask_token_id], list(range(place + 1)))
        expected += float(log_p[place, ids[place]])
    for estimator in ("auto", "stratified", "counts", "left_to_right"):
        (found,) = score([(CONTEXT, TOKENS)], 1, estimator=estimator, num_views=2)
        assert found.value == pytest.approx(expected, rel=1e-5), estimator


def test_one_token_to_score_is_exact_with_one_view(score: Score) -> None:
    exact, drawn = (score([(CONTEXT, TOKENS[:1])], 4, estimator=name)[0] for name in ("auto", "stratified"))
    assert exact.is_exact and len(exact.by_view) == 1
    assert drawn.by_view == pytest.approx([exact.value] * 8, rel=1e-5)


def test_an_autoregressive_model_scores_by_its_log_softmax(score: Score, weights: Weights) -> None:
    (found,) = score([(CONTEXT, TOKENS)], None)
    ids = [*CONTEXT, *TOKENS]
    log_p = _log_p(weights, ids, list(range(len(ids))))
    expected = sum(float(log_p[place - 1, ids[place]]) for place in range(len(CONTEXT), len(ids)))
    assert found.is_exact and found.value == pytest.approx(expected, rel=1e-5)


def test_blocks_of_one_token_with_a_shift_score_as_an_autoregressive_model(score: Score) -> None:
    (expected,) = score([(CONTEXT, TOKENS)], None)
    for estimator in ("auto", "stratified", "left_to_right"):
        (found,) = score([(CONTEXT, TOKENS)], 1, shift=True, estimator=estimator, num_views=3)
        # Nothing is left to chance: every view says the same.
        assert list(found.by_view) == pytest.approx([expected.value] * len(found.by_view), rel=1e-5), estimator


def test_a_shift_predicts_a_block_from_the_slots_before_its_tokens(score: Score, weights: Weights) -> None:
    """The first token by the clean block before it, then the others from left to right, each from its neighbour."""
    ids, size, expected = [*CONTEXT[:4], *TOKENS], 4, 0.0
    for place in range(4, len(ids)):
        begin = place // size * size
        shown = ids[:place] + [MODEL.mask_token_id] * (begin + size - place) * (place > begin)
        log_p = _log_p(weights, shown, [i // size for i in range(len(shown))])
        expected += float(log_p[place - 1, ids[place]])
    (found,) = score([(CONTEXT[:4], TOKENS)], size, shift=True, estimator="left_to_right", fill="mask")
    assert found.is_exact and found.value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("context", [CONTEXT[:4], CONTEXT[:3]], ids=["one block", "two blocks"])
def test_all_continuations_together_have_probability_1(context: tuple[int, ...], score: Score) -> None:
    every = [(context, tokens) for tokens in product(range(MODEL.vocab_size), repeat=2)]
    settings = dict(row_length=512)
    in_order = [found.value for found in score(every, 4, estimator="left_to_right", **settings)]
    elbo = [found.value for found in score(every, 4, estimator="exact", **settings)]
    assert sum(map(exp, in_order)) == pytest.approx(1.0, abs=1e-4)
    is_one_token_a_block = len(context) == 3
    assert sum(map(exp, elbo)) == pytest.approx(1.0, abs=1e-4) if is_one_token_a_block else sum(map(exp, elbo)) < 1.0
    assert min(elbo) < -1.0


def test_estimators_lie_around_the_exact_value(score: Score) -> None:
    # The noise follows from the key, so that many seeds are many keys of one call.
    tokens, num_seeds = TOKENS[:4], 192
    (exact,) = score([(CONTEXT[:4], tokens)], 4, estimator="exact")
    spread = {}
    for name in ("stratified", "counts", "t_uniform"):
        asked = [Continuation(CONTEXT[:4], tokens, noise_key=key) for key in range(num_seeds)]
        values = [found.value for found in score(asked, 4, estimator=name, num_views=4, row_length=1024)]
        spread[name] = stdev(values)
        assert abs(fmean(values) - exact.value) < 4 * spread[name] / sqrt(num_seeds), name
    # Four views of four tokens have every count once: only the subsets are left to chance.
    assert spread["stratified"] < spread["counts"] < spread["t_uniform"]


def test_the_stated_error_is_the_spread_over_seeds(score: Score) -> None:
    asked = [Continuation(CONTEXT, TOKENS, noise_key=key) for key in range(128)]
    found = score(asked, 4, estimator="counts", num_views=8, row_length=1024)
    stated = sqrt(fmean(item.standard_error**2 for item in found))
    assert stated == pytest.approx(stdev(item.value for item in found), rel=0.25)
    assert Likelihood((1.0,), is_exact=False).standard_error is None


def test_a_score_depends_on_its_continuation_alone(score: Score) -> None:
    asked = [Continuation(CONTEXT, TOKENS[:n], noise_key=n % 2 + 7) for n in (5, 3, 4, 1, 2)]
    expected = [score([item], 4, estimator="stratified")[0].by_view for item in asked]
    for row_length in (None, 40, 500):
        together = score([*asked, asked[0]], 4, estimator="stratified", row_length=row_length)
        assert [item.by_view for item in together[:-1]] == [pytest.approx(views, rel=1e-5) for views in expected]
        assert together[-1] == together[0]
    two_rows = score(asked, 4, rows_at_a_time=2, estimator="stratified", row_length=40)
    assert [item.by_view for item in two_rows] == [pytest.approx(views, rel=1e-5) for views in expected]
    other = score(asked, 4, estimator="stratified", seed=1)
    assert all(a.by_view != pytest.approx(b, rel=1e-3) for a, b in zip(other[:1], expected[:1], strict=True))


def test_choices_that_share_noise_are_compared_better(score: Score) -> None:
    one, two, keys = (2, 6, 5, 3), (2, 6, 5, 4), range(64)
    asked = [Continuation(CONTEXT[:4], one, key) for key in keys]
    asked += [Continuation(CONTEXT[:4], two, other + key) for other in (0, 1000) for key in keys]
    values = [found.value for found in score(asked, 4, estimator="t_uniform", num_views=2, row_length=1024)]
    first, same_noise, other_noise = values[:64], values[64:128], values[128:]
    shared = stdev(a - b for a, b in zip(first, same_noise, strict=True))
    apart = stdev(a - b for a, b in zip(first, other_noise, strict=True))
    assert shared < 0.7 * apart


def test_fill_makes_no_difference_at_the_end_of_a_block(score: Score) -> None:
    at_end, inside = (CONTEXT, TOKENS[:3]), (CONTEXT, TOKENS[:2])
    values = {fill: [item.value for item in score([at_end, inside], 4, fill=fill)] for fill in ("none", "mask", "eos")}
    assert values["none"][0] == pytest.approx(values["mask"][0], rel=1e-6)
    assert values["eos"][0] == pytest.approx(values["mask"][0], rel=1e-6)
    assert len({round(found[1], 3) for found in values.values()}) == 3


def test_the_last_block_may_be_cut_by_the_window(score: Score, weights: Weights) -> None:
    context = tuple(range(8)) * 3 + (1, 2, 3, 4, 5)  # 29, so that a block of 12 would end behind the window of 32
    (found,) = score([(context, (6, 7))], 12, estimator="exact")
    ids = [*context, 6, 7]
    expected = 0.0
    for hidden in ([29], [30], [29, 30]):
        shown = [MODEL.mask_token_id if i in hidden else token for i, token in enumerate(ids)] + [MODEL.mask_token_id]
        log_p = _log_p(weights, shown, [i // 12 for i in range(32)])
        expected += sum(float(log_p[i, ids[i]]) for i in hidden) / 2
    assert found.value == pytest.approx(expected, rel=1e-5)


def test_the_elbo_of_two_parts_adds_up_at_the_end_of_a_block(score: Score) -> None:
    first, second = (2, 6, 5), (3, 5, 1)
    whole, one, two = score(
        [(CONTEXT, first + second), (CONTEXT, first), ((*CONTEXT, *first), second)], 4, estimator="exact"
    )
    assert whole.value == pytest.approx(one.value + two.value, rel=1e-5)


def test_a_decision_is_sure_beyond_two_errors() -> None:
    exact = Likelihood((-3.0,), is_exact=True)
    drawn = Likelihood((-4.0, -5.0, -4.0, -5.0), is_exact=False)
    error = stdev((1.0, 2.0, 1.0, 2.0)) / 2
    assert decide([drawn, exact]) == Decision(1, 1.5, pytest.approx(error)) and decide([drawn, exact]).is_sure
    near = Likelihood((-4.1, -4.9, -3.0, -5.5), is_exact=False)
    assert not decide([near, drawn]).is_sure and decide([exact, exact]) == Decision(0, 0.0, 0.0)
    # Common noise cancels: the gap is sure although each score is not.
    shifted = Likelihood(tuple(value - 0.1 for value in drawn.by_view), is_exact=False)
    assert decide([shifted, drawn]).is_sure
    assert not decide([Likelihood((-1.0,), False), Likelihood((-9.0,), False)]).is_sure


@pytest.mark.parametrize(
    ("asked", "settings", "message"),
    [
        ((CONTEXT, ()), {}, "task q: the continuation is empty"),
        (
            (CONTEXT * 6, TOKENS),
            {},
            r"task q: context and continuation \(30 \+ 5 tokens\) must fit context_length \(32\)",
        ),
        ((CONTEXT, TOKENS * 7), {"truncate": True}, r"\(5 \+ 35 tokens\) must fit context_length \(32\)"),
        ((CONTEXT[:1], TOKENS * 3), {"estimator": "exact"}, r"task q: likelihood.estimator \(exact\) .* 15 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(asked: Any, settings: dict[str, Any], message: str, score: Score) -> None:
    with pytest.raises(ValueError, match=message):
        score([Continuation(*asked, name="task q")], 16, **settings)


def test_a_context_is_cut_at_its_beginning_if_asked(score: Score) -> None:
    cut, fitting = score([(CONTEXT * 6, TOKENS), ((CONTEXT * 6)[3:], TOKENS)], 4, truncate=True, estimator="exact")
    assert cut == fitting


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "guess"}, r"likelihood.estimator \(guess\) is not known"),
        ({"fill": "pad"}, r"likelihood.fill \(pad\) is not known"),
        ({"num_views": 0}, r"likelihood.num_views \(0\) must be positive"),
        ({"exact_up_to": 11}, r"likelihood.exact_up_to \(11\) must lie in"),
        ({"seed": -1}, r"likelihood.seed \(-1\) must lie in"),
        ({"row_length": 0}, r"likelihood.row_length \(0\) must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LikelihoodConfig(**settings).validate()

"""The distilled head against dense torch, and a model that teaches itself or is taught by a copy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.distillation import DistillRule
from megatron_dllm.model.asked import Asked, Taught
from megatron_dllm.model.distillation import Teacher, distilled_cross_entropy
from megatron_dllm.model.head import target_cross_entropy
from megatron_dllm.model.objective import Objective, token_loss
from tests.reference_model import random_weights, tiny_model, to_megatron
from tests.tiny_batch import tiny_batch

T, H, V = 40, 8, 24


def _drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Teacher]:
    """Hidden states, weight, targets, and a teacher that does not know every third target."""
    generator = torch.Generator().manual_seed(seed)
    hidden, states = torch.randn(2, T, H, generator=generator)
    weight, teacher_weight = torch.randn(2, V, H, generator=generator)
    ids = torch.randint(V, (T,), generator=generator)
    return hidden, weight, ids, Teacher(states, torch.arange(T) % 3 > 0, teacher_weight)


def _expected_kl(log_q: Tensor, teacher: Teacher, top_k: int | None) -> Tensor:
    log_p = torch.log_softmax(teacher.states @ teacher.weight.t(), -1)
    p, q = log_p.exp(), log_q.exp()
    if top_k is None:
        kl = (p * (log_p - log_q)).sum(-1)
    else:
        is_told = torch.zeros_like(p).scatter(-1, p.topk(top_k, dim=-1).indices, 1.0)
        rest_p, rest_q = (1.0 - (part * is_told).sum(-1) for part in (p, q))
        kl = (is_told * p * (log_p - log_q)).sum(-1) + rest_p * torch.log(rest_p / rest_q)
    return torch.where(teacher.is_known, kl, 0.0)


@pytest.mark.parametrize("chunk_elements", [None, 60])
@pytest.mark.parametrize("top_k", [None, 5])
def test_equals_dense_torch_with_gradients(top_k: int | None, chunk_elements: int | None) -> None:
    hidden, weight, ids, teacher = _drawn()
    scale = torch.rand(2, T, generator=torch.Generator().manual_seed(1))
    got, expected = ([value.clone().requires_grad_() for value in (hidden, weight)] for _ in range(2))
    outputs = distilled_cross_entropy(*got, ids, teacher, None, top_k, chunk_elements)
    log_q = torch.log_softmax(expected[0] @ expected[1].t(), -1)
    expected_nll, expected_kl = -log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1), _expected_kl(log_q, teacher, top_k)
    torch.testing.assert_close(outputs.nll, expected_nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.kl, expected_kl, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs.is_correct, target_cross_entropy(hidden, weight, ids, None).is_correct)
    assert bool((outputs.kl >= 0.0).all()) and float(outputs.kl[1]) > 0.1 and float(outputs.kl[0]) == 0.0
    (outputs.nll * scale[0] + outputs.kl * scale[1]).sum().backward()
    (expected_nll * scale[0] + expected_kl * scale[1]).sum().backward()
    for found, value in zip(got, expected, strict=True):
        torch.testing.assert_close(found.grad, value.grad, rtol=1e-4, atol=2e-5)


def test_all_tokens_told_apart_are_the_whole_vocabulary() -> None:
    hidden, weight, ids, teacher = _drawn()
    results = []
    for top_k in (None, V, V + 7):
        leaf = hidden.clone().requires_grad_()
        outputs = distilled_cross_entropy(leaf, weight, ids, teacher, None, top_k)
        outputs.kl.sum().backward()
        results.append((outputs.kl.detach(), leaf.grad))
    for kl, gradient in results[1:]:
        torch.testing.assert_close(kl, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_logits_is_student_minus_teacher_by_finite_differences() -> None:
    """The head's weight is the identity, so that hidden states are logits."""
    generator = torch.Generator().manual_seed(0)
    logits, states = torch.randn(2, 3, 6, generator=generator)
    ids, teacher = torch.tensor([0, 1, 2]), Teacher(states, torch.ones(3, dtype=torch.bool), torch.eye(6))

    def kl(values: Tensor) -> Tensor:
        return distilled_cross_entropy(values, torch.eye(6), ids, teacher, None).kl.sum()

    leaf = logits.clone().requires_grad_()
    kl(leaf).backward()
    torch.testing.assert_close(leaf.grad, logits.softmax(-1) - states.softmax(-1), rtol=1e-5, atol=1e-6)
    for row, column in ((0, 0), (1, 4), (2, 5)):
        step = torch.zeros_like(logits)
        step[row, column] = 0.02
        slope = float(kl(logits + step) - kl(logits - step)) / 0.04
        assert slope == pytest.approx(float(leaf.grad[row, column]), abs=1e-3)


def test_no_target_is_nothing() -> None:
    hidden, weight, ids, teacher = _drawn()
    leaf, empty = hidden[:0].clone().requires_grad_(), Teacher(teacher.states[:0], teacher.is_known[:0], teacher.weight)
    for top_k in (None, 4):
        outputs = distilled_cross_entropy(leaf, weight, ids[:0], empty, None, top_k)
        (outputs.nll.sum() + outputs.kl.sum()).backward()
        assert outputs.kl.shape == (0,) and leaf.grad.shape == (0, H)


# ---- in the model ------------------------------------------------------------------------------


def _build(model: ModelConfig) -> Any:
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.parallel.groups import Groups

    built = build_model(model, ParallelConfig(), Groups.current())
    built.load_state_dict(to_megatron(model, random_weights(model)), strict=False)
    return built.train()


def _objective(rule: DistillRule) -> Objective:
    return Objective(None, rule.shift, token_loss, distill=rule)


def _ar_log_p(built: Any, tokens: Tensor) -> Tensor:
    """[n, v] log probabilities of the token after each of n tokens, read as one AR document."""
    places = torch.arange(len(tokens))
    roles = torch.stack([torch.zeros_like(places), places, torch.zeros_like(places)], -1).int()
    states = built.states(tokens[None], places[None], roles[None], places)
    return torch.log_softmax(built.head_logits(states), -1).detach()


def _documents(batch: Batch) -> dict[tuple[int, int], Tensor]:
    """By row and document the true tokens, from views without a mask and from targets."""
    found: dict[tuple[int, int], dict[int, int]] = {}
    num_rows, length = batch.input_ids.shape
    targets = dict(zip(batch.target_positions.tolist(), batch.target_ids.tolist(), strict=True))
    for row in range(num_rows):
        for slot in range(length):
            doc, place = int(batch.roles[row, slot, 0]), int(batch.position_ids[row, slot])
            if doc >= 0:
                token = targets.get(row * length + slot, int(batch.input_ids[row, slot]))
                found.setdefault((row, doc), {})[place] = token
    return {key: torch.tensor([ids[place] for place in sorted(ids)]) for key, ids in found.items()}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("is_own", [True, False])
def test_targets_are_compared_with_the_ar_predictions_of_the_true_tokens(is_own: bool) -> None:
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.frozen import FrozenModel
    from megatron_dllm.training.teaching import teach

    model, rule = tiny_model(), DistillRule(1.0, is_own)
    batch = tiny_batch(model, [[17, 9], [24]], row_length=80, block_size=4, num_views=2, has_clean=True)
    is_clean = batch.roles[..., 2] == 0
    if is_own:  # clean blocks of one token, as clean_block_size 1 has them
        batch.roles[..., 1] = torch.where(is_clean, batch.position_ids.int(), batch.roles[..., 1])
    else:  # without the clean copies, as documents of one block are
        batch.roles[..., 0] = torch.where(is_clean, -1, batch.roles[..., 0])
    built = _build(model)
    if is_own:
        built.skips_outputs = True
    frozen = FrozenModel([_build(model)], torch.device("cpu"), Groups.current())
    (said,) = teach(frozen, [batch], _objective(rule)) or [Taught()]
    outputs = built(batch, asked=Asked(distill=rule, teacher=said.teacher))
    plain = built(batch)
    torch.testing.assert_close(outputs.nll, plain.nll, rtol=1e-5, atol=1e-5)
    chosen = built.states(batch.input_ids, batch.position_ids, batch.roles, batch.target_positions)
    log_q = torch.log_softmax(built.head_logits(chosen), -1)
    documents, length = _documents(batch), batch.input_ids.shape[1]
    tables = {key: _ar_log_p(built, tokens) for key, tokens in documents.items()}
    num_first = 0
    for index, flat in enumerate(batch.target_positions.tolist()):
        row, slot = divmod(flat, length)
        place = int(batch.position_ids[row, slot])
        num_first += place == 0
        expected = 0.0
        if place > 0:
            log_p = tables[row, int(batch.roles[row, slot, 0])][place - 1]
            expected = float((log_p.exp() * (log_p - log_q[index])).sum())
        assert float(outputs.kl[index]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert int((~outputs.has_teacher).sum()) == num_first > 0


@pytest.mark.usefixtures("one_rank")
def test_a_student_that_is_its_teacher_and_reads_what_it_reads_has_no_divergence() -> None:
    """AR rows, whose targets predict the next token: with a shift the student's slot is the teacher's."""
    from megatron_dllm.parallel.groups import Groups
    from megatron_dllm.training.frozen import FrozenModel
    from megatron_dllm.training.teaching import teach

    model = tiny_model()
    batch = tiny_batch(model, [[17, 9], [24]], row_length=28, block_size=1, num_views=0)
    rule = DistillRule(1.0, is_own=False, shift=True)
    frozen = FrozenModel([_build(model)], torch.device("cpu"), Groups.current())
    (said,) = teach(frozen, [batch], _objective(rule))
    outputs = _build(model)(batch, asked=Asked(distill=rule, teacher=said.teacher))
    assert bool(outputs.has_teacher.all()) and len(outputs.kl) == 16 + 8 + 23
    assert float(outputs.kl.abs().max()) < 1e-6
    (outputs.kl.sum()).backward()
    (unshifted,) = teach(frozen, [batch], _objective(replace(rule, shift=False)))
    without = unshifted.teacher
    assert not bool(without.is_known.any()), "without a shift, targets on clean tokens are those of an AR loss"

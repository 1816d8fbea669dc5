"""AR and block diffusion are two values of the same type, with the loss of the note's formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_dllm.config import AlignmentConfig, CapConfig, DistillConfig, NoiseConfig, SftConfig, StageConfig
from megatron_dllm.data.batch import collate
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.diffusion.losses.alignment import AlignmentRule
from megatron_dllm.diffusion.losses.distillation import DistillRule
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.model.head import target_cross_entropy
from megatron_dllm.model.objective import Objective, objective_of, token_loss, validation_objective
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.training.balancing import balance_batches
from tests.reference_model import tiny_model
from tests.tiny_batch import tiny_batch
from tests.unit.data.made_rows import make_row, spec

STAGE = StageConfig(block_size=4, num_tokens=100, global_batch_size=1, learning_rate=1.0, t_max=0.9)


def test_a_stage_names_its_noise_and_its_targets() -> None:
    noise = NoiseConfig(t_unit="document")
    assert objective_of(STAGE, noise) == Objective(NoiseSpec.for_stage(noise, STAGE), shift=False, loss=token_loss)
    assert objective_of(replace(STAGE, objective="ar"), noise) == Objective(None, shift=True, loss=token_loss)


def test_confidence_aware_training_with_coefficient_0_is_the_plain_objective() -> None:
    """As a value: the same loss function, and nothing more is asked of the model or added up."""
    noise = NoiseConfig()
    off = replace(STAGE, cap=CapConfig(coefficient=0.0, temperature=0.5))
    assert objective_of(off, noise) == objective_of(STAGE, noise)
    assert objective_of(off, noise).entropy_temperature is None


def test_alignment_with_weight_0_is_the_plain_objective() -> None:
    noise = NoiseConfig()
    assert objective_of(replace(STAGE, alignment=AlignmentConfig(masked=False)), noise) == objective_of(STAGE, noise)
    aligned = objective_of(replace(STAGE, alignment=AlignmentConfig(0.5, masked_layers=0.25)), noise)
    assert aligned.alignment == AlignmentRule(0.5, masked_layers=0.25, shift=False)
    assert replace(aligned, alignment=None) == objective_of(STAGE, noise)


def test_distillation_with_weight_0_is_the_plain_objective_and_adds_its_divergence_otherwise() -> None:
    noise = NoiseConfig()
    assert objective_of(replace(STAGE, distill=DistillConfig(0.0, top_k=3)), noise) == objective_of(STAGE, noise)
    stage = replace(STAGE, distill=DistillConfig(0.5, "teacher", top_k=3))
    objective = objective_of(stage, noise)
    assert objective.distill == DistillRule(0.5, is_own=False, top_k=3, shift=False)
    batch = tiny_batch(tiny_model(), [[17, 9], [24]], row_length=56, block_size=4)
    generator = torch.Generator().manual_seed(0)
    nll, kl = torch.rand(2, len(batch.target_ids), generator=generator)
    outputs = TargetOutputs(nll, nll < 0.5, kl=kl, has_teacher=kl > 0.5)
    found, plain = objective.loss(batch, outputs), token_loss(batch, outputs)
    added = 0.5 * float((kl * batch.loss_weights).sum())
    assert float(found.total) == pytest.approx(float(plain.total) + added, rel=1e-6)
    assert float(found.sums.loss) == pytest.approx(float(found.total), rel=1e-6)
    assert float(found.sums.extra["distill_loss"]) == pytest.approx(added, rel=1e-6)
    assert found.sums.ratios["distill_kl"].tolist() == pytest.approx([float(kl.sum()), float((kl > 0.5).sum())])
    assert (tuple(found.sums.extra), tuple(found.sums.ratios)) == (objective.extra_sums, objective.ratios)


def test_validation_measures_by_counts_and_ar_exactly() -> None:
    assert validation_objective("32") == Objective(NoiseSpec.for_validation(), shift=False, loss=token_loss)
    assert validation_objective("ar") == Objective(None, shift=True, loss=token_loss)


def test_the_loss_of_tokens_by_hand() -> None:
    batch = tiny_batch(tiny_model(), [[17, 9], [24]], row_length=56, block_size=4)
    batch = replace(batch, num_maskable=torch.tensor(50))
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(len(batch.target_ids), generator=generator).requires_grad_()
    is_correct = nll.detach() < 0.5
    found = token_loss(batch, TargetOutputs(nll, is_correct))
    expected = sum(float(n) * float(w) for n, w in zip(nll.detach(), batch.loss_weights, strict=True))
    torch.testing.assert_close(float(found.total), expected, rtol=1e-6, atol=0.0)
    assert found.count == 50 and found.sums.count == 50
    assert found.sums.num_correct == int(is_correct.sum()) and found.sums.num_targets == len(nll)
    found.total.backward()
    assert torch.equal(nll.grad, batch.loss_weights)


def test_the_diffusion_loss_and_the_ar_loss_are_two_means_by_hand(one_rank: Groups) -> None:
    """Two micro-batches with other numbers of both kinds: L = L_diff / N_diff + 0.5 L_AR / N_AR over both."""
    objective = objective_of(replace(STAGE, clean_block_size=1, ar_weight=0.5), NoiseConfig())
    geometry = RowGeometry("block_diffusion", 4, 32, 96, 1, clean_block_size=1, ar_share=1.0)
    batches = [collate([make_row(lengths, geometry, spec())]) for lengths in ([13, 1, 9], [6, 20])]
    generator = torch.Generator().manual_seed(0)
    nlls = [torch.rand(len(batch.target_ids), generator=generator).requires_grad_() for batch in batches]
    balanced = balance_batches(batches, objective.ar_weight, torch.device("cpu"), one_rank)
    found = [objective.loss(b, TargetOutputs(nll, nll < 0.5)) for b, nll in zip(balanced, nlls, strict=True)]
    noisy = sum(float((n * b.loss_weights)[b.target_views > 0].sum()) for b, n in zip(batches, nlls, strict=True))
    clean = torch.cat([nll[batch.target_views == 0] for batch, nll in zip(batches, nlls, strict=True)])
    expected = noisy / 49 + 0.5 * float(clean.mean())
    assert len(clean) == sum(int(batch.num_ar_maskable) for batch in batches) == 22 + 24 - 2
    assert sum(float(part.total) for part in found) / 49 == pytest.approx(expected, rel=1e-6)
    assert sum(int(part.count) for part in found) == 49
    flat = torch.stack([part.sums.flatten() for part in found]).sum(0)
    sums = found[0].sums.rebuild(flat)
    assert sums.mean_loss == pytest.approx(expected, rel=1e-6)
    assert float(sums.extra["diffusion_loss"]) / 49 == pytest.approx(noisy / 49, rel=1e-6)
    assert float(sums.ratios["ar_loss"][0] / sums.ratios["ar_loss"][1]) == pytest.approx(float(clean.mean()), rel=1e-6)
    assert float(sums.num_targets) == sum(int((b.target_views > 0).sum()) for b in batches)
    assert float(sums.buckets[:, 1].sum()) == float(sums.num_targets)
    assert tuple(sums.extra) == objective.extra_sums and tuple(sums.ratios) == objective.ratios


def test_a_step_of_ar_rows_alone_is_divided_by_their_tokens(one_rank: Groups) -> None:
    objective = objective_of(replace(STAGE, ar_weight=0.5, ar_row_share=0.5), NoiseConfig())
    row = make_row([13, 9], RowGeometry("ar", 1, 32, 96, 0), None)
    of_ar = dict(num_maskable=torch.tensor(0), num_ar_maskable=torch.tensor(20), is_ar_target=torch.ones(20).bool())
    batch = replace(collate([row]), **of_ar)
    (balanced,) = balance_batches([batch], objective.ar_weight, torch.device("cpu"), one_rank)
    nll = torch.full((20,), 3.0)
    found = objective.loss(balanced, TargetOutputs(nll, nll < 0.0))
    assert float(found.total / found.count) == pytest.approx(0.5 * 3.0)


def _cap_and_plain(is_right: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Total and gradients of hidden states and weight, with a coefficient of 2 and plain, through the real head.

    Args:
        is_right: whether every second target is the most likely token; otherwise none is.
    """
    batch = tiny_batch(tiny_model(), [[17, 9], [24]], row_length=56, block_size=4)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(batch.target_ids), 12, generator=generator)
    weight = torch.randn(96, 12, generator=generator)
    order = (hidden @ weight.t()).argsort(dim=-1)
    targets = order[:, 0].clone()
    if is_right:
        targets[::2] = order[::2, -1]
    results = []
    for coefficient in (2.0, 0.0):
        objective = objective_of(replace(STAGE, cap=CapConfig(coefficient, temperature=0.5)), NoiseConfig())
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        temperature = objective.entropy_temperature
        outputs = target_cross_entropy(*leaves, targets, None, entropy_temperature=temperature)
        found = objective.loss(batch, outputs)
        assert tuple(found.sums.extra) == objective.extra_sums
        assert tuple(found.sums.level_means) == objective.level_means
        results.append([found.total.detach(), *torch.autograd.grad(found.total, leaves)])
    return results[0], results[1]


def test_confidence_loss_adds_the_entropies_of_right_guesses() -> None:
    (total, of_hidden, _), (plain, of_hidden_plain, _) = _cap_and_plain(is_right=True)
    batch = tiny_batch(tiny_model(), [[17, 9], [24]], row_length=56, block_size=4)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(batch.target_ids), 12, generator=generator).double().requires_grad_()
    log_p = torch.log_softmax(hidden @ torch.randn(96, 12, generator=generator).double().t() / 0.5, -1)
    expected = 2.0 * -(log_p.exp() * log_p).sum(-1)[::2].sum()
    torch.testing.assert_close((total - plain).double(), expected.detach(), rtol=1e-5, atol=0)
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close((of_hidden - of_hidden_plain).double(), expected_gradient, rtol=1e-4, atol=1e-5)
    assert torch.equal(of_hidden[1::2], of_hidden_plain[1::2]), "a wrong guess feels nothing"


def test_where_nothing_is_right_confidence_changes_no_bit() -> None:
    for found, expected in zip(*_cap_and_plain(is_right=False), strict=True):
        assert torch.equal(found, expected)


def test_chats_log_the_share_of_fill_and_may_count_answers() -> None:
    stage = replace(STAGE, sft=SftConfig())
    batch = tiny_batch(tiny_model(), [[17, 9], [24]], row_length=56, block_size=4)
    is_fill = torch.arange(len(batch.target_ids)) < 5
    batch = replace(batch, is_fill=is_fill, num_maskable=torch.tensor(50), num_answers=torch.tensor(3))
    nll = torch.ones(len(batch.target_ids))
    outputs = TargetOutputs(nll, nll > 0)
    per_token = objective_of(stage, NoiseConfig())
    found, plain = per_token.loss(batch, outputs), token_loss(batch, outputs)
    assert found.total == plain.total and found.count == plain.count == per_token.count(batch) == 50
    assert tuple(found.sums.ratios) == per_token.ratios
    assert found.sums.ratios["fill_share"].tolist() == [5, len(nll)]

    per_answer = objective_of(replace(stage, sft=SftConfig(loss_per="answer")), NoiseConfig())
    found = per_answer.loss(batch, outputs)
    assert found.total == plain.total and found.count == per_answer.count(batch) == 3
    assert (found.sums.count, found.sums.num_maskable) == (3, 50)


def test_confidence_and_chats_go_together() -> None:
    stage = replace(STAGE, sft=SftConfig(), cap=CapConfig(coefficient=2.0))
    objective = objective_of(stage, NoiseConfig())
    assert objective.ratios == ("fill_share",) and objective.extra_sums == ("confidence_loss",)
    assert objective.entropy_temperature == 1.0

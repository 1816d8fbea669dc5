"""What a stage trains for: its noise, what its targets are, and the loss of a micro-batch, as one frozen value.

A method is such a value. The loop, the step and the schedule take it and never ask which one it is:

    objective = objective_of(stage, noise)          # or another method's function of the same two
    rows are built with objective.noise             # None: nothing is masked
    objective.loss(batch, outputs)                  # the sum to differentiate, its denominator, the sums to log

Losses are sums. The division happens once, by the count of the global batch (see `diffusion.losses.nll`). A loss that
compares documents needs their scores first:

    weighing = objective.weigh(scores, reference)   # factors of the loss weights; then the step is as ever
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_dllm.config import AlignmentConfig, DistillConfig, NoiseConfig, PreferenceConfig, StageConfig
from megatron_dllm.config.distill import CLEAN
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.alignment import AlignmentRule
from megatron_dllm.diffusion.losses.cap import LEVEL_MEANS, confidence_levels, right_entropy
from megatron_dllm.diffusion.losses.distillation import DistillRule
from megatron_dllm.diffusion.losses.document_scores import DocumentScores, Weighing
from megatron_dllm.diffusion.losses.nll import weighted_nll
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.diffusion.losses.preference import PreferenceRule, weigh_pairs
from megatron_dllm.diffusion.losses.step_sums import StepSums, token_sums
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.model.attention.annealing import Annealing, Opening

AR = "ar"
# The largest reward margin, beta times the margin, of a run that starts from its reference: scores that were computed
# in another layout or in bf16 differ by rounding.
START_REWARD = 0.1


@dataclass(frozen=True)
class MicroLoss:
    """What a loss function says of one micro-batch, or of this context rank's part of it.

    Attributes:
        total: [] fp32 sum, with a gradient.
        count: [] int64 what the micro-batch adds to the denominator; of whole rows, also where they are split.
        sums: what is logged.
    """

    total: Tensor
    count: Tensor
    sums: StepSums


LossFunction = Callable[[Batch, TargetOutputs], MicroLoss]
Count = Callable[[Batch], Tensor]


def maskable_tokens(batch: Batch) -> Tensor:
    """[] int64 tokens that could have carried a loss, in every view."""
    return batch.num_maskable


def answers(batch: Batch) -> Tensor:
    """[] int64 answers that could have carried a loss, once for each view."""
    return batch.num_answers


def documents(batch: Batch) -> Tensor:
    """[] int64 segments of the micro-batch."""
    return batch.num_segments.sum()


@dataclass(frozen=True)
class Objective:
    """A method of training.

    Attributes:
        noise: how tokens are masked; None: not at all.
        shift: whether a slot predicts the token after it; otherwise its own.
        loss: of a micro-batch and what the model says about its targets; right and finite for 0 targets.
        extra_sums: names of what `loss` puts into `StepSums.extra`, in order.
        level_means: names of what `loss` puts into `StepSums.level_means`, in order.
        ratios: names of what `loss` puts into `StepSums.ratios`, in order.
        count: of a micro-batch, what `loss` is a mean over.
        entropy_temperature: what the model is asked for (see `model.head`): the entropy of its predictions at this
            temperature, and their largest probability; None: neither.
        ar_weight: of the AR loss of clean tokens, see `training.balancing`; 0: they have none.
        weigh: from the scores of a global batch's documents, and [d, k] or [d, 1] fp64 those of a reference, to the
            factors of their loss weights; None: the loss does not compare documents.
        largest_start_margin: above which `Weighing.largest_margin` says that a run does not start from its reference.
        alignment: of states behind the layers, beside the loss; None: none.
        annealing: of the attention mask, in one of the stage's steps; None: the mask is open.
        distill: the head compares targets with a teacher; None: it does not.
    """

    noise: NoiseSpec | None
    shift: bool
    loss: LossFunction
    extra_sums: tuple[str, ...] = ()
    level_means: tuple[str, ...] = ()
    ratios: tuple[str, ...] = ()
    count: Count = maskable_tokens
    entropy_temperature: float | None = None
    ar_weight: float = 0.0
    weigh: Callable[[DocumentScores, Tensor], Weighing] | None = None
    largest_start_margin: float = math.inf
    alignment: AlignmentRule | None = None
    distill: DistillRule | None = None
    annealing: Annealing | None = None

    @property
    def has_second_teacher(self) -> bool:
        """Whether a second model teaches."""
        return any(rule is not None and not rule.is_own for rule in (self.alignment, self.distill))

    @property
    def opening(self) -> Opening | None:
        """How far the attention mask is open; None: all of it."""
        return None if self.annealing is None else self.annealing.opening

    def at(self, step: int) -> Objective:
        """The objective in the step after so many of its stage."""
        return self if self.annealing is None else replace(self, annealing=self.annealing.at(step))


def token_loss(batch: Batch, outputs: TargetOutputs) -> MicroLoss:
    """The weighted NLL of the targets: the NELBO with weights 1/t, the exact NLL in AR."""
    total = weighted_nll(outputs.nll, batch.loss_weights)
    sums = token_sums(total, batch.num_maskable, outputs.nll, outputs.is_correct, batch.target_t)
    return MicroLoss(total, batch.num_maskable, sums)


def guided_loss(batch: Batch, outputs: TargetOutputs) -> MicroLoss:
    """The diffusion loss and the AR loss beside it, whose loss weights are balanced already.

    Both are divided by the maskable tokens. What is logged of targets is of the diffusion loss; beside that stand
    the two losses, the AR loss without its weight.
    """
    is_diffusion = ~batch.is_ar_target
    total = weighted_nll(outputs.nll, batch.loss_weights)
    sums = token_sums(total, batch.num_maskable, outputs.nll, outputs.is_correct, batch.target_t, is_diffusion)
    noisy = weighted_nll(torch.where(is_diffusion, outputs.nll, 0.0), batch.loss_weights)
    clean = torch.where(is_diffusion, 0.0, outputs.nll).double().sum()
    sums = sums.with_extra(diffusion_loss=noisy).with_ratios(ar_loss=(clean, (~is_diffusion).sum()))
    return MicroLoss(total, batch.num_maskable, sums)


def cap_loss(coefficient: float, batch: Batch, outputs: TargetOutputs) -> MicroLoss:
    """The loss of tokens, and `coefficient` times the entropies of the targets that were guessed right.

    Both are divided by the same number, so the second adds `confidence_loss` to the logged loss.
    """
    assert outputs.entropy is not None, "the head was not asked for the entropy"
    confidence = coefficient * right_entropy(outputs.entropy, outputs.is_correct)
    total = weighted_nll(outputs.nll, batch.loss_weights) + confidence
    sums = token_sums(total, batch.num_maskable, outputs.nll, outputs.is_correct, batch.target_t)
    levels = confidence_levels(outputs, batch.target_t)
    return MicroLoss(total, batch.num_maskable, sums.with_extra(confidence_loss=confidence).with_level_means(levels))


def distilled_loss(weight: float, token_loss: LossFunction, batch: Batch, outputs: TargetOutputs) -> MicroLoss:
    """A loss of tokens, and `weight` times the KL of every target from its teacher, with the loss weights of the NLL.

    Both are divided by the same number, so the second adds `distill_loss` to the logged loss. `distill_kl` is a mean
    over the targets that have a teacher, without weights.
    """
    assert outputs.kl is not None and outputs.has_teacher is not None, "the head was not asked for the divergence"
    found, added = token_loss(batch, outputs), weight * weighted_nll(outputs.kl, batch.loss_weights)
    sums = found.sums.with_loss(found.sums.loss + added.detach().double(), found.sums.count)
    sums = sums.with_extra(distill_loss=added).with_ratios(distill_kl=(outputs.kl.sum(), outputs.has_teacher.sum()))
    return MicroLoss(found.total + added, found.count, sums)


def chat_loss(token_loss: LossFunction, count: Count, batch: Batch, outputs: TargetOutputs) -> MicroLoss:
    """A loss of tokens, with what is logged of chats, as a mean over what `count` counts.

    For a mean over answers, the weights of their tokens are divided by their lengths where rows are built
    (`data.row_noise`).
    """
    found = token_loss(batch, outputs)
    num_targets, counted = found.sums.num_targets, count(batch)
    sums = found.sums.with_ratios(fill_share=(batch.is_fill.sum(), num_targets))
    return MicroLoss(found.total, counted, replace(sums, count=counted.double()))


def objective_of(stage: StageConfig, noise: NoiseConfig) -> Objective:
    """The objective that a stage of the configuration names.

    Args:
        stage: its objective, shift, loss weight, range of t, views, AR loss, confidence, alignment, teacher, annealing,
            chats and preferences.
        noise: settings that hold for the whole run.
    """
    if stage.objective == AR:
        return Objective(noise=None, shift=stage.is_shifted, loss=token_loss)
    objective = Objective(noise=NoiseSpec.for_stage(noise, stage), shift=stage.is_shifted, loss=token_loss)
    if stage.ar_weight:
        objective = replace(
            objective, loss=guided_loss, extra_sums=("diffusion_loss",), ratios=("ar_loss",), ar_weight=stage.ar_weight
        )
    if stage.cap.coefficient != 0.0:
        objective = replace(
            objective,
            loss=partial(cap_loss, stage.cap.coefficient),
            extra_sums=("confidence_loss",),
            level_means=LEVEL_MEANS,
            entropy_temperature=stage.cap.temperature,
        )
    if stage.alignment.weight != 0.0:
        objective = replace(objective, alignment=_alignment(stage.alignment, objective.shift))
    if stage.attention_anneal is not None:
        objective = replace(objective, annealing=Annealing(stage.attention_anneal))
    if stage.distill.weight != 0.0:
        objective = _distilled(objective, stage.distill)
    if stage.sft is None:
        return objective
    count = answers if stage.sft.loss_per == "answer" else maskable_tokens
    if stage.preference is not None:
        count, objective = documents, _preferring(objective, stage.preference)
    ratios = (*objective.ratios, "fill_share")
    return replace(objective, loss=partial(chat_loss, objective.loss, count), ratios=ratios, count=count)


def _alignment(config: AlignmentConfig, shift: bool) -> AlignmentRule:
    is_own = config.source == CLEAN
    return AlignmentRule(config.weight, config.visible, config.masked, config.masked_layers, shift, is_own)


def _distilled(objective: Objective, config: DistillConfig) -> Objective:
    return replace(
        objective,
        distill=DistillRule(config.weight, config.source == CLEAN, config.top_k, objective.shift),
        loss=partial(distilled_loss, config.weight, objective.loss),
        extra_sums=(*objective.extra_sums, "distill_loss"),
        ratios=(*objective.ratios, "distill_kl"),
    )


def _preferring(objective: Objective, preference: PreferenceConfig) -> Objective:
    """An objective whose loss compares the two answers of pairs."""
    beta, shares = preference.beta, preference.share_noise
    return replace(
        objective,
        weigh=partial(weigh_pairs, PreferenceRule(beta, preference.sft_coefficient, shares)),
        # Rounding alone; on other masks the scores of equal weights differ.
        largest_start_margin=START_REWARD / beta if shares else math.inf,
    )


def validation_objective(name: str, shift: bool = False) -> Objective:
    """What a validation measures: the exact NLL for "ar", the ELBO for a block size, of a model with that shift."""
    if name == AR:
        return Objective(noise=None, shift=True, loss=token_loss)
    return Objective(noise=NoiseSpec.for_validation(), shift=shift, loss=token_loss)

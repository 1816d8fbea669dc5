"""Representation alignment: the state of a noisy token behind a layer is drawn to that of a clean one.

    loss of a pair = 1 - cos(state of the noisy token, state of the clean token), whose gradient is stopped

A layer's loss enters the backward pass with the layer's output (`align`), as the auxiliary loss of megatron-core's
routers does: so it works on every pipeline stage, and where the layer is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dllm.diffusion.losses.step_sums import StepSums

# Shorter states count as this long: the cosine of a state of 0 is 0.
_LEAST_NORM = 1e-6
# Columns of what a layer comes to.
VISIBLE_LOSS, NUM_VISIBLE, MASKED_LOSS, NUM_MASKED = range(4)
NUM_COLUMNS = 4


@dataclass(frozen=True)
class AlignmentRule:
    """What is aligned, and how strongly.

    Attributes:
        weight: of the losses, next to the NLL.
        visible: noisy tokens that are not masked are paired with the clean copy of the same token, in every layer.
        masked: targets in noisy views are paired with the clean token before the one that they predict.
        masked_layers: share of the layers, from the last one down, in which they are.
        shift: a position predicts the token after it.
        is_own: the model's own clean tokens teach; otherwise a second model's.
    """

    weight: float
    visible: bool = True
    masked: bool = True
    masked_layers: float = 0.5
    shift: bool = False
    is_own: bool = True

    def num_masked_layers(self, num_layers: int) -> int:
        """Layers in which masked targets are aligned."""
        return max(1, round(self.masked_layers * num_layers))

    def scales(self, layer_number: int, num_layers: int) -> tuple[float, float]:
        """What the losses of visible and of masked tokens are multiplied by behind a layer; 1 is the first."""
        above = self.num_masked_layers(num_layers)
        is_upper = layer_number > num_layers - above
        visible = self.weight / num_layers if self.visible else 0.0
        return visible, self.weight / above if self.masked and is_upper else 0.0

    def logged(self, sums: StepSums, totals: Tensor, num_layers: int) -> StepSums:
        """The sums of a global batch, with what the alignment came to.

        `alignment_loss` is what it adds to what is minimised, divided as the loss is; the others are means of
        1 - cosine.

        Args:
            sums: of the global batch.
            totals: [NUM_COLUMNS] fp64 over its pairs and all layers.
            num_layers: of the model.
        """
        visible, num_visible, masked, num_masked = totals.unbind()
        loss = self.weight * (visible / num_layers + masked / self.num_masked_layers(num_layers))
        ratios = dict(alignment_visible=(visible, num_visible), alignment_masked=(masked, num_masked))
        kept = [name for name, is_used in zip(ratios, (self.visible, self.masked), strict=True) if is_used]
        return sums.with_extra(alignment_loss=loss).with_ratios(**{name: ratios[name] for name in kept})


def align(hidden: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The states as they are, whose gradient gets that of the alignment added.

    Args:
        hidden: [..., h] states of n tokens.
        teacher: [n, h] what each is drawn to; it gets no gradient.
        weights: [n] fp32 of each token's loss; 0 where it has no partner.

    Returns:
        [..., h] the states, and [n] fp32 1 - cosine of each token, without gradient.
    """
    aligned, distance = _Align.apply(hidden, teacher, weights)  # type: ignore[no-untyped-call]
    return aligned, distance


class _Align(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, teacher, weights)
        distance = 1.0 - _unit_vectors(hidden, teacher)[-1].squeeze(-1)
        ctx.mark_non_differentiable(distance)
        return hidden.view_as(hidden), distance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        hidden, teacher, weights = ctx.saved_tensors
        unit, length, teacher_unit, cosine = _unit_vectors(hidden, teacher)
        # d cos / d x = (y/|y| - cos x/|x|) / |x|
        towards = unit.mul_(-cosine).add_(teacher_unit).mul_(-weights.unsqueeze(-1) / length)
        return grad + towards.view_as(grad).to(grad.dtype), None, None


def _unit_vectors(hidden: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[n, h] x/|x|, [n, 1] |x|, [n, h] y/|y| and [n, 1] their cosine, in fp32.

    Args:
        hidden: [..., h] x of n tokens.
        teacher: [n, h] y.
    """
    x, y = hidden.reshape(teacher.shape).float(), teacher.float()
    x_length, y_length = (value.norm(dim=-1, keepdim=True).clamp(min=_LEAST_NORM) for value in (x, y))
    x, y = x / x_length, y / y_length
    return x, x_length, y, (x * y).sum(-1, keepdim=True)

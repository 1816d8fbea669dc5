"""What a stage's method costs beside a forward and a backward pass: passes without gradients, teachers, states."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.config import AlignmentConfig, DistillConfig, StageConfig
from megatron_dllm.config.distill import TEACHER

# Operations for each weight of the head and target: of logits in a pass without gradients, of a teacher's logits, which
# are formed twice, and of a teacher's where its likeliest tokens alone are told apart.
_SCORED, _TAUGHT, _TAUGHT_TOP = 2.0, 4.0, 2.0


@dataclass(frozen=True)
class MethodCost:
    """Of a stage. A stage that trains on the NLL alone has none of it.

    Attributes:
        forward_passes: of a whole model without gradients in every step, of each micro-batch.
        attention_share: pairs that attention computes in such a pass, beside those of the row.
        is_whole: such a pass computes the last layer for all tokens.
        head_operations: more than the NLL takes, for each weight of the head and target.
        has_teacher: a teacher's logits stand beside the model's.
        is_taught_before: it is a second model, whose states of the targets lie in memory before they are needed.
        entropy_tensors: fp32 tensors of a chunk of logits that the entropy of confidence-aware training needs.
        aligned_share: share of the layers whose output is aligned.
        is_aligned_before: so do the states that these layers are drawn to.
    """

    forward_passes: int = 0
    attention_share: float = 1.0
    is_whole: bool = False
    head_operations: float = 0.0
    has_teacher: bool = False
    is_taught_before: bool = False
    entropy_tensors: int = 0
    aligned_share: float = 0.0
    is_aligned_before: bool = False


def method_cost(stage: StageConfig, num_models: int) -> MethodCost:
    """What a stage asks for.

    Args:
        stage: of the schedule.
        num_models: that lie in memory; each of them scores the answers of a stage of preferences.
    """
    if stage.preference is not None:
        return MethodCost(forward_passes=num_models, head_operations=_SCORED * num_models)
    distill, alignment, cap = stage.distill, stage.alignment, stage.cap
    taught = 0.0 if not distill.weight else _TAUGHT if distill.top_k is None else _TAUGHT_TOP
    is_taught, is_aligned = _has_second(distill), _has_second(alignment)
    has_second = is_taught or is_aligned
    return MethodCost(
        forward_passes=int(has_second),
        # It reads every token once: of n views and their clean copies, each with half of a square, one.
        attention_share=1.0 / (stage.num_views + 1) if has_second else 1.0,
        is_whole=has_second,
        head_operations=taught,
        has_teacher=bool(distill.weight),
        is_taught_before=is_taught,
        # Its gradient, and at other temperatures than 1 the probabilities at that temperature.
        entropy_tensors=0 if not cap.coefficient else 1 if cap.temperature == 1.0 else 2,
        aligned_share=_aligned_share(alignment),
        is_aligned_before=is_aligned,
    )


def _has_second(method: AlignmentConfig | DistillConfig) -> bool:
    return bool(method.weight) and method.source == TEACHER


def _aligned_share(alignment: AlignmentConfig) -> float:
    if not alignment.weight:
        return 0.0
    return 1.0 if alignment.visible else alignment.masked_layers

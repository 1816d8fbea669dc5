"""Learning rates by kind of parameter, as parameter groups of megatron-core's optimizer.

A group's factor is its `lr_mult`, by which megatron-core tells groups apart. The groups are no part of a checkpoint,
whose moments belong to single parameters: a run may go on in another layout or with another table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.optimizer import MegatronOptimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.utils import unwrap_model
from torch import nn

from megatron_dllm.checkpoint.sharded_state import model_state
from megatron_dllm.config import TrainConfig
from megatron_dllm.config.rates import rate_factor
from megatron_dllm.hf.name_table import key_aliases


def rate_overrides(
    config: TrainConfig, chunks: Sequence[nn.Module], standard: MegatronOptimizerConfig
) -> dict[ParamKey, Any] | None:
    """What differs from group to group: megatron-core's own rules, and the factor of each parameter.

    Args:
        config: of the run.
        chunks: the local model.
        standard: whose own rules (no weight decay of norms and biases) stay.

    Returns:
        Overrides by the parameters they are for; None where all learn alike, which leaves megatron-core its own.
    """
    multipliers = config.optimizer.lr_multipliers
    if not multipliers:
        return None
    names = _stored_names(config, chunks)
    factors = {identity: rate_factor(name, multipliers) for identity, name in names.items()}
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(standard))
    for factor in sorted({*factors.values()} - {1.0}):
        chosen = {identity for identity, other in factors.items() if other == factor}
        predicate = ParamWithNamePredicate(f"lr_mult {factor}", lambda parameter, _, ids=chosen: id(parameter) in ids)
        overrides[ParamKey(with_name_predicate=predicate)] = {"lr_mult": factor}
    return overrides


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group: the schedule's, times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)


def _stored_names(config: TrainConfig, chunks: Sequence[nn.Module]) -> dict[int, str]:
    """By id of every local parameter its name in checkpoints, which is the same in all layouts and on all devices."""
    one_name = {stored: name for name, stored in key_aliases(config.model).items()}
    found = {}
    for chunk, state in zip(chunks, model_state(chunks).values(), strict=True):
        for name, parameter in unwrap_model(chunk).named_parameters():
            key = state[name].key
            found[id(parameter)] = one_name.get(key, key)
    return found

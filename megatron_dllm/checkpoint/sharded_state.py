"""Weights and optimizer state as megatron-core's sharded state dicts: a tensor per parameter, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch import nn

from megatron_dllm.parallel.optimizer_parts import optimizer_parts

# Model-space optimizer state with keys that do not depend on how many optimizers are chained.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def model_state(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Sharded state dict of all local model chunks, tensors only; their keys are global names.

    Objects (modules' `_extra_state`, empty in this model) are left out: loading them would unpickle.
    """
    states = [unwrap_model(chunk).sharded_state_dict(metadata=dict(_METADATA)) for chunk in chunks]
    tensors = {
        f"chunk{i}": {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}
        for i, state in enumerate(states)
    }
    assert not any(isinstance(value, ShardedObject) for value in nested_values(tensors)), "an object lies deeper"
    return tensors


def optimizer_state(
    optimizer: MegatronOptimizer, model_sharded_state: dict[str, Any], is_loading: bool
) -> dict[int, Any]:
    """Sharded moments and main weights. Their keys are global names; the place in the chain is this rank's affair."""
    return {
        i: part.sharded_param_state_fully_reshardable(model_sharded_state, is_loading, dict(_METADATA))
        for i, part in enumerate(optimizer_parts(optimizer))
    }

"""What a table of learning rates by parameter must keep to, checked against the model's names before a run starts."""

from __future__ import annotations

from fnmatch import fnmatchcase

from megatron_dllm.config import ModelConfig, TrainConfig
from megatron_dllm.config.rates import rate_factor
from megatron_dllm.config.rules import check
from megatron_dllm.hf.name_table import weight_map

EMBEDDING = "embedding.word_embeddings.weight"


def parameter_names(model: ModelConfig) -> list[str]:
    """Names of a model's parameters in checkpoints; the router's bias is none, as no gradient moves it."""
    return [name for name in weight_map(model).mcore_shapes if not name.endswith(".expert_bias")]


def check_rates(config: TrainConfig, knows_masks: bool) -> None:
    """Refuse a glob that matches nothing, and a table that would hold back the mask token.

    Args:
        config: of the run.
        knows_masks: the run starts from weights that were trained on masked tokens.

    Raises:
        ValueError: naming the glob, or the factor of the embedding.
    """
    multipliers = config.optimizer.lr_multipliers
    names = parameter_names(config.model) if multipliers else []
    for glob in multipliers:
        check(
            any(fnmatchcase(name, glob) for name in names),
            f"optimizer.lr_multipliers ({glob}) matches no parameter of the model; names are as {names[-3]}, "
            "and * stands for any part of them.",
        )
    factor = rate_factor(EMBEDDING, multipliers)
    masks = any(stage.objective != "ar" for stage in config.schedule.stages.values())
    check(
        knows_masks or not masks or factor >= 1.0,
        f"optimizer.lr_multipliers gives {EMBEDDING} the factor {factor:g}, which must be at least 1 from weights that "
        "have seen no masks: the mask token's row is one of its rows and has still to be learned; put "
        f"{EMBEDDING}: 1.0 behind the others.",
    )

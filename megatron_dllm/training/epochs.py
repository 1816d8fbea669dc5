"""What the stages that train chats, or that last so many epochs, have to know of the documents before a run starts."""

from __future__ import annotations

from megatron_dllm.config import TrainConfig
from megatron_dllm.data.epoch import check_chats, measure_epoch
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.source import Source


def epoch_tokens(config: TrainConfig, source: Source) -> dict[str, int]:
    """Document tokens of one pass over the documents, by the name of each stage that trains chats or counts epochs.

    Raises:
        ValueError: a stage cannot train these documents as chats; says why.
    """
    tokens = {}
    for name, stage in config.schedule.stages.items():
        if stage.sft is None and stage.num_epochs is None:
            continue
        geometry = RowGeometry.of_stage(stage, config.schedule, config.data)
        epoch = measure_epoch(source, geometry)
        if stage.sft is not None:
            check_chats(source, geometry, epoch, f"schedule.stages.{name}")
        tokens[name] = epoch.num_tokens
    return tokens


def chat_warnings(config: TrainConfig, source: Source) -> list[str]:
    """What trains chats otherwise than they are served, a sentence each."""
    warnings = []
    for name, stage in config.schedule.stages.items():
        prefix = f"schedule.stages.{name}.sft"
        if source.spans is None or stage.objective == "ar":
            continue
        if stage.sft is None:
            warnings.append(
                f"{prefix} (null) trains the chats of {source.name} as they stand: answers see what follows them in "
                f"their block, and nothing fills their last one; take schedule sft, or give {prefix} in a recipe."
            )
        elif stage.sft.turn_boundary == "all":
            warnings.append(
                f"{prefix}.turn_boundary (all) shows answers what follows them in their block, which a server never "
                "does; use split_views."
            )
    return warnings

"""What the stages that train chats, or that last so many epochs, have to know of the documents before a run starts."""

from __future__ import annotations

from megatron_dllm.config import TrainConfig
from megatron_dllm.config.rules import check
from megatron_dllm.data.epoch import Epoch, check_chats, measure_epoch
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.training.sources import Sources


def epoch_tokens(config: TrainConfig, sources: Sources) -> dict[str, int]:
    """Document tokens of one pass over the documents, by the name of each stage that trains chats or counts epochs.

    Of several corpora the largest number stands there: a stage that counts epochs has one.

    Raises:
        ValueError: a stage cannot train these documents as chats, or counts epochs of several corpora; says why.
    """
    tokens: dict[str, int] = {}
    epochs: dict[tuple[str, RowGeometry], Epoch] = {}  # counted once for all stages with the same rows
    for name, stage in config.schedule.stages.items():
        if stage.sft is None and stage.num_epochs is None:
            continue
        parts, key = config.blend_of(name), f"schedule.stages.{name}"
        check(
            stage.num_epochs is None or len(parts) == 1,
            f"{key}.num_epochs ({stage.num_epochs}) counts passes over one corpus, and the stage blends "
            f"{len(parts)}; give num_tokens.",
        )
        geometry = RowGeometry.of_stage(stage, config.schedule, config.data)
        has_chats = any(sources.corpora[part.prefix].spans is not None for part in parts)
        for part in parts:
            source, counted = sources.corpora[part.prefix], (part.prefix, geometry)
            epoch = epochs[counted] = epochs.get(counted) or measure_epoch(source, geometry)
            if stage.sft is not None and (source.spans is not None or not has_chats):  # a text may be blended in
                check_chats(source, geometry, epoch, key)
            tokens[name] = max(tokens.get(name, 0), epoch.num_tokens)
    return tokens


def chat_warnings(config: TrainConfig, sources: Sources) -> list[str]:
    """What trains chats otherwise than they are served, a sentence each."""
    warnings = []
    for name, stage in config.schedule.stages.items():
        prefix = f"schedule.stages.{name}.sft"
        pairs = [part.source.name for part in sources.of_stage(name) if part.source.is_paired]
        if pairs and stage.preference is None:
            warnings.append(
                f"schedule.stages.{name}.preference (null) trains the rejected answers of {', '.join(pairs)} like the "
                "chosen ones; take schedule dpo, or tokenize the chosen ones as chats."
            )
        chats = [part.source.name for part in sources.of_stage(name) if part.source.spans is not None]
        if not chats or stage.objective == "ar":
            continue
        if stage.sft is None:
            warnings.append(
                f"{prefix} (null) trains the chats of {', '.join(chats)} as they stand: answers see what follows them "
                f"in their block, and nothing fills their last one; take schedule sft, or give {prefix} in a recipe."
            )
        elif stage.sft.turn_boundary == "all":
            warnings.append(
                f"{prefix}.turn_boundary (all) shows answers what follows them in their block, which a server never "
                "does; use split_views."
            )
    return warnings

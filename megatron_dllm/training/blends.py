"""What each stage of a run trains on, and whether a resume may train on something else.

A blend is written here as shares by fingerprint: what a corpus holds counts, not where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_dllm.checkpoint.meta import CorpusRecord
from megatron_dllm.config import TrainConfig
from megatron_dllm.training.run_state import RunState
from megatron_dllm.training.sources import Share, Sources

Shares = dict[str, float]


def stage_shares(config: TrainConfig, sources: Sources) -> dict[str, Shares]:
    """By stage name, each corpus's share of the document tokens, by fingerprint."""
    return {
        name: {part.source.fingerprint: part.share for part in sources.of_stage(name)}
        for name in config.schedule.stages
    }


def corpora_of_stages(config: TrainConfig, sources: Sources) -> dict[str, tuple[CorpusRecord, ...]]:
    """By stage name, what its checkpoints say that it trains on."""
    return {name: tuple(_record(part) for part in sources.of_stage(name)) for name in config.schedule.stages}


def _record(part: Share) -> CorpusRecord:
    source = part.source
    name = source.name.rstrip("/").rpartition("/")[2]
    return CorpusRecord(name, source.fingerprint, part.share, source.num_tokens, source.chat_template)


def check_not_exhausted(config: TrainConfig, sources: Sources) -> None:
    """Refuse a schedule that reads a corpus more than once, where the configuration says so.

    Raises:
        ValueError: naming the corpus, what it holds and what the schedule wants.
    """
    if config.data.on_exhausted == "repeat":
        return
    epochs: dict[str, float] = {}
    for name, stage in config.schedule.stages.items():
        for part in config.blend_of(name):
            held = sources.corpora[part.prefix].num_tokens
            wanted = stage.num_epochs if stage.num_tokens is None else part.share * stage.num_tokens / held
            epochs[part.prefix] = epochs.get(part.prefix, 0.0) + (wanted or 0.0)
    for prefix, count in epochs.items():
        if count > 1.0:
            raise ValueError(
                f"data.on_exhausted (refuse) allows one epoch, and the schedule reads corpus {prefix} "
                f"{count:.2f} times; lower its weight or the stages' num_tokens, or choose repeat."
            )


def blend_changes(config: TrainConfig, sources: Sources, state: RunState, stages: Sequence[str]) -> list[str]:
    """What stages train on that the checkpoint says otherwise, a sentence each.

    Args:
        config: of this start.
        sources: of this start.
        state: of the checkpoint.
        stages: names of the stages that are to be trained now.
    """
    shares = stage_shares(config, sources)
    named = [*sources.corpora.items(), *((f"{name} (AR rows)", rows) for name, rows in sources.ar_rows.items())]
    names = {source.fingerprint: name for name, source in named}
    known = {corpus["fingerprint"]: corpus["name"] for corpus in state.stream.get("corpora", [])}
    changes = []
    for stage in stages:
        was, now = state.blends.get(stage), shares[stage]
        if was is not None and was != now:
            key = "data.train" if config.schedule.stages[stage].train is None else f"schedule.stages.{stage}.train"
            listed = _differences(was, now, known | names)
            changes.append(f"{key} differs from the checkpoint's in stage {stage}: {'; '.join(listed)}")
    return changes


def check_blends(changes: Sequence[str], config: TrainConfig, folder: Path) -> None:
    """Refuse changes that were not asked for.

    Args:
        changes: as `blend_changes` tells them.
        config: of this start.
        folder: of the checkpoint, for the message.

    Raises:
        ValueError: naming what differs, and the key that allows it.
    """
    if changes and not config.data.change_blend:
        raise ValueError(
            f"{changes[0]} (checkpoint {folder}). Restore the corpora and weights, or allow the change with "
            "data.change_blend=true."
        )


def _differences(was: Mapping[str, float], now: Mapping[str, float], names: Mapping[str, str]) -> list[str]:
    """What differs between two blends, for a message."""

    def text(fingerprint: str) -> str:
        return f"{names.get(fingerprint, 'a corpus')} (fingerprint {fingerprint.removeprefix('sampled-')[:8]})"

    new = [f"{text(key)} is new, {share:.1%}" for key, share in now.items() if key not in was]
    gone = [f"{text(key)} is gone, {share:.1%}" for key, share in was.items() if key not in now]
    moved = [
        f"{text(key)} {share:.1%} instead of {was[key]:.1%}"
        for key, share in now.items()
        if was.get(key, share) != share
    ]
    return [*new, *gone, *moved]

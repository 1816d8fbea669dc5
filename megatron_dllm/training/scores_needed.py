"""What the scores of a stage's pairs depend on, and whether those of a file are the ones that a run needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dllm.config import TrainConfig
from megatron_dllm.config.rules import check
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.diffusion.block_schedule import BlockSchedule
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.evaluation.scores_file import check_content, open_scores
from megatron_dllm.evaluation.scores_header import ScoresHeader, check_header
from megatron_dllm.training.sources import Sources


def preference_stages(config: TrainConfig) -> list[str]:
    """Names of the stages that compare answers."""
    return [name for name, stage in config.schedule.stages.items() if stage.preference is not None]


def reference_warnings(config: TrainConfig) -> list[str]:
    """A reference without effect, in a sentence."""
    reference = config.preference.reference
    if reference is None or preference_stages(config):
        return []
    return [
        f"preference.reference ({reference}) has no effect, as no stage compares answers; leave it out, or give a "
        "stage its preference."
    ]


def needed_headers(
    config: TrainConfig, sources: Sources, checkpoint: str, schedule: BlockSchedule, tokens: Mapping[str, int]
) -> Mapping[str, ScoresHeader]:
    """By name of each stage that compares answers, what its scores depend on.

    Args:
        config: of the run.
        sources: of the run.
        checkpoint: fingerprint of the weights that the run starts from.
        schedule: of the run.
        tokens: document tokens of an epoch, by the name of the stage.

    Raises:
        ValueError: the run reads several corpora, and a file holds the scores of one.
    """
    prefixes = config.train_corpora
    check(
        len(prefixes) == 1,
        f"a file of scores is of one corpus, and the run trains on {', '.join(prefixes)}; give data.train one prefix "
        "of pairs, or take preference.reference=frozen.",
    )
    (source,) = sources.corpora.values()
    headers = {}
    for name in preference_stages(config):
        stage = config.schedule.stages[name]
        geometry = RowGeometry.of_stage(stage, config.schedule, config.data)
        headers[name] = ScoresHeader(
            checkpoint=checkpoint,
            corpus=source.fingerprint,
            chat_template=source.chat_template,
            seed=config.run.seed,
            block_size=geometry.block_size,
            context_length=geometry.context_length,
            fill=geometry.fill,
            turn_boundary=geometry.turn_boundary,
            precision=config.parallel.precision,
            noise=NoiseSpec.for_stage(config.noise, stage).stated(),
            num_documents=len(source.document_lengths),
            num_epochs=-(-schedule.stages[-1].end // tokens[name]),
        )
    return headers


def check_scores(path: Path, headers: Mapping[str, ScoresHeader]) -> None:
    """Refuse a file that is damaged, or has not the scores that every stage needs; reads all of it.

    Raises:
        ValueError: naming the file, and the first setting that differs.
    """
    stored = open_scores(path)
    check_content(path)
    for header in headers.values():
        check_header(path, stored.header, header)


def check_scored_corpus(stream: Mapping[str, Any], sources: Sources) -> None:
    """Refuse a run that goes on with pairs of another corpus: their noise is not that of a new run.

    Args:
        stream: position of the checkpoint that the run continues from; empty for a new run.
        sources: of the run.

    Raises:
        ValueError: it was begun with another corpus.
    """
    begun = [corpus["fingerprint"] for corpus in stream.get("corpora", [])[:1]]
    (source,) = sources.corpora.values()
    check(
        begun in ([], [source.fingerprint]),
        f"data.train ({source.name}) is not the corpus that the run began with, so its noise is not that of its file "
        "of scores; start a new run from the weights, or take preference.reference=frozen.",
    )

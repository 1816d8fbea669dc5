"""The stages of a run as its start finds them: corpora read and checked, rows packed from their first documents."""

from __future__ import annotations

import numpy as np

from megatron_dllm.config import TrainConfig
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import LENGTH, split_segments
from megatron_dllm.data.source import Source
from megatron_dllm.data.spans import segment_spans
from megatron_dllm.diffusion.block_schedule import StageRow
from megatron_dllm.planning.rows import measured_row
from megatron_dllm.planning.work import StageWork
from megatron_dllm.training.sources import Sources
from megatron_dllm.training.start import decide_start


def measured_work(config: TrainConfig) -> tuple[StageWork, ...]:
    """The stages with the rows of their corpora.

    Raises:
        ValueError: what a start of the run would refuse.
    """
    sources = Sources(config)
    start = decide_start(config, None, sources)
    return tuple(_stage_work(config, line, sources) for line in start.table)


def _stage_work(config: TrainConfig, line: StageRow, sources: Sources) -> StageWork:
    assert line.estimate is not None, "a start estimates the rows of every stage"
    stage = line.stage
    geometry = RowGeometry.of_stage(stage.config, config.schedule, config.data)
    # The largest corpus stands for the others of a blend.
    source = max(sources.of_stage(stage.name), key=lambda part: part.share).source
    segments = _first_segments(source, 4 * config.data.packing_chunk, geometry.context_length)
    spans = segment_spans(source.spans, segments)
    row = measured_row(geometry, stage.config, line.estimate.document_tokens, segments[:, LENGTH], spans)
    return StageWork(stage.name, stage.config, row, stage.end - stage.start)


def _first_segments(source: Source, number: int, context_length: int) -> np.ndarray:
    """[p, 4] int64 segments of the first documents."""
    number = min(number, len(source.document_lengths))
    documents = np.zeros((number, 4), dtype=np.int64)
    documents[:, 0], documents[:, LENGTH] = np.arange(number), source.document_lengths[:number]
    return split_segments(documents, context_length)

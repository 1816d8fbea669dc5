"""Rows of an evaluation: every document once, in its own order, the last step filled up with rows of padding."""

from __future__ import annotations

from megatron_dllm.config import TrainConfig
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import BatchLoader, RowDataset
from megatron_dllm.data.packing import RowStream
from megatron_dllm.parallel.groups import Groups


def row_loader(config: TrainConfig, groups: Groups, dataset: RowDataset, stream: RowStream) -> BatchLoader:
    """The first epoch of a stream as the micro-batches of this rank.

    Every data-parallel rank gets equally many, as experts are shared between them; and as many at a time as pipeline
    stages keep busy (virtual stages take no fewer).

    Args:
        config: of the measurement.
        groups: of this rank.
        dataset: builds the rows.
        stream: at its beginning.
    """
    ranks, rows = groups.data.size(), config.evaluation.micro_batch_size
    return BatchLoader(
        dataset,
        stream,
        global_batch_size=rows * ranks * config.parallel.pipeline_model_parallel_size,
        micro_batch_size=rows,
        data_parallel_rank=groups.data.rank(),
        data_parallel_size=ranks,
        num_rows=count_rows(stream, dataset.geometry),
    )


def count_rows(stream: RowStream, geometry: RowGeometry) -> int:
    """Rows of the stream's first epoch."""
    stream, count = stream.copy(), 0
    while stream.next(geometry).epoch == 0:
        count += 1
    return count

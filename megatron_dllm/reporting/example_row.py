"""A packed row as a run's last stage sees it, rebuilt from its configuration and its corpus, to draw its mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dllm.compose import register_schemas
from megatron_dllm.config import TrainConfig
from megatron_dllm.data.batch import Batch, collate
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowDataset
from megatron_dllm.data.packing import LENGTH, RowStream
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.reporting.history import Run

_ROWS_LOOKED_AT = 64
_LONGEST_ROW = 4096  # tokens: the picture has a pixel a pair


@dataclass(frozen=True)
class ExampleRow:
    """A row, and what it shows."""

    batch: Batch
    caption: str


def example_row(run: Run) -> ExampleRow:
    """A row of the run's last stage, of several documents if there is one.

    Raises:
        ValueError: it cannot be rebuilt: the corpus is gone, the configuration is of another version, the row is too
            long for a picture; says which.
    """
    config = _typed(run)
    return row_of(config, str(_base_folder(run) / config.train_corpora[-1]))


def row_of(config: TrainConfig, corpus_prefix: str) -> ExampleRow:
    """A row of the last stage of a configuration, from a corpus.

    Raises:
        ValueError: the corpus is not there, or the row is too long for a picture.
    """
    stage = list(config.schedule.stages.values())[-1]
    geometry = RowGeometry.of_stage(stage, config.schedule, config.data)
    if geometry.row_length > _LONGEST_ROW:
        raise ValueError(f"its rows ({geometry.row_length} tokens) are longer than a picture shows ({_LONGEST_ROW})")
    corpus = Corpus(corpus_prefix, config.model)
    noise = None if stage.objective == "ar" else NoiseSpec.for_stage(config.noise, stage)
    model = config.model
    dataset = RowDataset(
        corpus, geometry, noise, config.run.seed, model.mask_token_id, model.pad_token_id, model.eos_token_id
    )
    stream = RowStream(
        corpus.document_lengths,
        config.run.seed,
        config.data.packing_chunk,
        spans=corpus.spans,
        is_paired=corpus.is_paired,
    )
    plans = [stream.next(geometry) for _ in range(_ROWS_LOOKED_AT)]
    plan = max(plans, key=lambda plan: int((plan.segments[:, LENGTH] > 2 * stage.block_size).sum()))
    return ExampleRow(
        collate([dataset[plan]]),
        f"A row of {geometry.row_length} tokens, {len(plan.segments)} segments, block size {stage.block_size}",
    )


def _base_folder(run: Run) -> Path:
    """The folder that relative paths of the configuration start from, as far as the run's own place tells."""
    place = Path(str(run.setting("run", "root"))) / str(run.setting("run", "name"))
    is_inside = not place.is_absolute() and run.folder.parts[-len(place.parts) :] == place.parts
    return run.folder.parents[len(place.parts) - 1] if is_inside else Path()


def _holds_reference(value: object) -> bool:
    """Whether any text in it is something that OmegaConf would resolve."""
    if isinstance(value, dict):
        return any(map(_holds_reference, [*value, *value.values()]))
    if isinstance(value, list):
        return any(map(_holds_reference, value))
    return isinstance(value, str) and "${" in value


def _typed(run: Run) -> TrainConfig:
    """The configuration as the schema's own. Text that OmegaConf would resolve is refused, not resolved.

    Raises:
        ValueError: it does not fit the schema, or asks for something to be resolved.
    """
    if _holds_reference(run.config):
        raise ValueError("its config.yaml holds '${', which is not resolved here")
    register_schemas()
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), run.config))
    except OmegaConfBaseException as error:
        raise ValueError(f"its config.yaml does not fit this version: {str(error).splitlines()[0]}") from None
    assert isinstance(config, TrainConfig), "the schema is of that class"
    if not config.schedule.stages or not config.train_corpora[-1]:
        raise ValueError("its config.yaml names no stage or no corpus")
    return config

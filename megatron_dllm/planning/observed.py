"""Steps of runs that have been: read from config.yaml, starts.jsonl and metrics.jsonl of their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dllm.compose import to_train_config
from megatron_dllm.config import StageConfig, TrainConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.config.rules import check
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.planning.calibration import Observation, machine_of
from megatron_dllm.planning.layout_plan import Candidate, Setting
from megatron_dllm.planning.methods import method_cost
from megatron_dllm.planning.rows import RowContent, assumed_row
from megatron_dllm.planning.work import StageWork
from megatron_dllm.run.files import read_json_lines
from megatron_dllm.run.names import CONFIG, METRICS, STARTS

# The first logged steps of a stage compile and fill caches, where more follow.
_LEFT_OUT = 2
_GIB = 2**30


def read_observations(
    folders: Sequence[str], cluster: ClusterConfig, assumptions: AssumptionsConfig
) -> list[Observation]:
    """The median step of every stage of these runs.

    Args:
        folders: of runs.
        cluster: on which they ran.
        assumptions: constants before.

    Raises:
        ValueError: a folder is no run, or no step of it was logged.
    """
    found = []
    for folder in map(Path, folders):
        check(
            (folder / CONFIG).is_file() and (folder / METRICS).is_file(),
            f"calibrate ({folder}) must name folders of runs, with {CONFIG} and {METRICS}; give the run's folder.",
        )
        found += _of_run(folder, cluster, assumptions)
    check(bool(found), f"calibrate ({', '.join(folders)}) has no step with step_seconds; let the run log some steps.")
    return found


def _of_run(folder: Path, cluster: ClusterConfig, assumptions: AssumptionsConfig) -> list[Observation]:
    config = _config(folder)
    machine, num_models = machine_of(cluster, assumptions), 1 + config.has_second_model
    setting = Setting(config.model, config.training, config.optimizer, machine, num_models)
    records = [record for record in read_json_lines(folder / METRICS) if "step_seconds" in record]
    starts = [start for start in read_json_lines(folder / STARTS) if "world_size" in start]
    found = []
    for name, stage in config.schedule.stages.items():
        own = [record for record in records if record.get("stage") == name]
        if not own:
            continue
        own = own[_LEFT_OUT:] if len(own) > 2 * _LEFT_OUT else own
        work = StageWork(name, stage, _row(config, stage, own), None)
        candidate = Candidate(config.layout_of(stage), stage.world_size or _world_size(starts, own[-1]))
        seconds = median(record["step_seconds"] for record in own)
        micro_batches = () if method_cost(stage, num_models).forward_passes else _of_ranks(own, "micro_batch_seconds")
        peaks = _of_ranks(own, "peak_memory_gib")
        peak = round(max(peaks) * _GIB) if peaks else None
        found.append(Observation(f"{folder.name} {name}", setting, work, candidate, seconds, micro_batches, peak))
    return found


def _of_ranks(records: Sequence[dict[str, Any]], name: str) -> tuple[float, ...]:
    """The median of each pipeline rank; empty where the runs' version did not measure it."""
    ranks = takewhile(lambda rank: all(f"{name}/{rank}" in record for record in records), count())
    return tuple(median(record[f"{name}/{rank}"] for record in records) for rank in ranks)


def _config(folder: Path) -> TrainConfig:
    """What a run was configured as.

    Raises:
        ValueError: its config.yaml is of another version of the program, or no configuration at all.
    """
    try:
        return to_train_config(OmegaConf.merge(OmegaConf.structured(TrainConfig()), OmegaConf.load(folder / CONFIG)))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"calibrate ({folder}) must name runs of this version of the program, and {CONFIG} cannot be read "
            f"({reason}); give another run."
        ) from None


def _world_size(starts: Sequence[dict[str, Any]], record: dict[str, Any]) -> int:
    """Ranks of the start that made a record."""
    before = [start for start in starts if start.get("step", 0) < record["step"]]
    return int(before[-1]["world_size"]) if before else 1


def _row(config: TrainConfig, stage: StageConfig, records: Sequence[dict[str, Any]]) -> RowContent:
    """A mean row of the logged steps; pairs are those of documents as long as the context."""
    geometry = RowGeometry.of_stage(stage, config.schedule, config.data)
    assumed = assumed_row(geometry, stage, config.schedule.context_length)

    def per_row(rate: str) -> float:
        return median(record[rate] * record["step_seconds"] for record in records) / stage.global_batch_size

    tokens = per_row("tokens_per_second")
    return replace(
        assumed,
        document_tokens=tokens,
        targets=per_row("targets_per_second"),
        pairs=assumed.pairs * tokens / assumed.document_tokens,
        source="measured: metrics of the run",
    )

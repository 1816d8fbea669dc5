"""Metrics of a run: metrics.jsonl always, TensorBoard and W&B (offline too) beside it. Rank 0 alone has it."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_dllm.config import TrainConfig
from megatron_dllm.diffusion.losses.step_sums import NUM_BUCKETS
from megatron_dllm.run.files import naming
from megatron_dllm.run.names import METRICS
from megatron_dllm.training.observers.curves import Curves, TensorBoard, WandB
from megatron_dllm.training.observers.metrics_file import read_metrics
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.reports import StepReport, ValidationReport
from megatron_dllm.training.step import StepResult

_LEVELS = tuple(f"{index / NUM_BUCKETS:.1f}-{(index + 1) / NUM_BUCKETS:.1f}" for index in range(NUM_BUCKETS))


class MetricsWriter(Observer):
    """Writes one record at a time to every sink. `step` counts optimizer steps, in all stages together."""

    def __init__(self, run_folder: Path, config: TrainConfig, wandb_mode: str) -> None:
        """Open every sink.

        Args:
            run_folder: whose metrics.jsonl has been cut back to where the run continues.
            config: of the run.
            wandb_mode: disabled, offline or online, as it was decided.
        """
        records = read_metrics(run_folder)
        self._file = open(run_folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._curves: list[Curves] = []
        if config.logging.tensorboard:
            self._curves.append(TensorBoard(run_folder, records))
        if wandb_mode != "disabled":
            self._curves.append(WandB(run_folder, config, wandb_mode, records))

    def after_step(self, report: StepReport, measured: Mapping[str, Any]) -> None:
        """Write the record of a step that is logged."""
        if report.is_logged:
            self.write(report.step, {**_position(report), **measured, **_speed(report)})

    def after_validation(self, report: ValidationReport) -> None:
        """Write what a validation came to."""
        result = report.validation
        record: dict[str, Any] = {
            "validation": True,
            "stage": report.stage.name,
            "consumed_tokens": report.consumed_tokens,
            "is_stage_end": report.is_stage_end,
            **{f"validation_elbo/{name}": value for name, value in result.nats_per_token.items()},
            **{f"validation_bits_per_byte/{name}": value for name, value in result.bits_per_byte.items()},
        }
        if result.conditions is not None:
            record["conditions"] = asdict(result.conditions)
        self.write(report.step, record)

    def before_save(self, step: int) -> None:
        """Put the curves on disk before the checkpoint whose records they show."""
        for curves in self._curves:
            curves.flush()

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Append a record; numbers also go to TensorBoard and W&B under their names."""
        record = {"step": step, **record}
        with naming(Path(self._file.name)):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for curves in self._curves:
            curves.write(record)

    def close(self) -> None:
        """Flush and close every sink."""
        with naming(Path(self._file.name)):
            self._file.close()
        for curves in self._curves:
            curves.close()


def _position(report: StepReport) -> dict[str, Any]:
    """Where a step stands, and what it came to."""
    block_size = report.stage.config.block_size
    return {
        "stage": report.stage.name,
        "stage_index": report.stage.index,
        "block_size": block_size,
        "consumed_tokens": report.consumed_tokens,
        "learning_rate": report.learning_rate,
        **_opening(report),
        **step_record(report.result),
        f"loss_block/{block_size}": report.result.loss,
    }


def _opening(report: StepReport) -> dict[str, float]:
    """How much of the attention mask was open, where that changes in the stage."""
    annealing = report.stage.config.attention_anneal
    return {} if annealing is None else {"attention_open": annealing.open_share(report.stage_step)}


def _speed(report: StepReport) -> dict[str, float]:
    return {
        "tokens_per_second": report.num_document_tokens / report.seconds,
        "forward_tokens_per_second": report.num_forward_tokens / report.seconds,
        "targets_per_second": _num_targets(report.result) / report.seconds,
        "step_seconds": report.seconds,
        "peak_memory_gib": peak_memory_gib(),
    }


def _num_targets(result: StepResult) -> float:
    """Tokens with a loss, those of an AR loss beside the diffusion loss included."""
    of_ar = result.sums.ratios.get("ar_loss")
    return float(result.sums.num_targets) + (0.0 if of_ar is None else float(of_ar[1]))


def step_record(result: StepResult) -> dict[str, float]:
    """Loss, accuracy and the per-t-bucket means of one step; buckets without tokens are left out.

    An objective's own sums appear under their names, divided as the loss is; its ratios, and its means per noise level,
    by numbers of their own.
    """
    sums = result.sums
    targets = float(sums.num_targets.clamp(min=1))
    record = {
        "loss": result.loss,
        "masked_nll": float(sums.nll) / targets,
        "masked_accuracy": float(sums.num_correct) / targets,
        "masked_fraction": targets / float(sums.num_maskable.clamp(min=1)),
        "grad_norm": result.grad_norm,
    }
    for level, (nll, count, correct) in zip(_LEVELS, sums.buckets.tolist(), strict=True):
        if count > 0:
            record[f"nll_t/{level}"] = nll / count
            record[f"accuracy_t/{level}"] = correct / count
    record |= {name: float(value / sums.count.clamp(min=1)) for name, value in sums.extra.items()}
    record |= {name: float(pair[0] / pair[1].clamp(min=1)) for name, pair in sums.ratios.items()}
    for name, table in sums.level_means.items():
        levels = zip(_LEVELS, table.tolist(), strict=True)
        record |= {f"{name}/{level}": value / count for level, (value, count) in levels if count > 0}
    return record


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: of the GPU's allocator, or the resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

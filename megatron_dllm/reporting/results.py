"""The table of results: what was measured of each model, in nats per token and bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_dllm.checkpoint.folder import list_checkpoints
from megatron_dllm.checkpoint.ranking import rank
from megatron_dllm.checkpoint.validation import Validation, read_validation
from megatron_dllm.reporting.held_out import difference
from megatron_dllm.reporting.history import History, Track
from megatron_dllm.reporting.records import Record, number
from megatron_dllm.run.names import CHECKPOINTS

_ELBO, _BITS = "validation_elbo/", "validation_bits_per_byte/"


@dataclass(frozen=True)
class Result:
    """A line of the results.

    Attributes:
        name: of the model.
        measure: what was measured.
        nats: per token.
        bits: per byte of UTF-8 text; NaN where the bytes are not known.
        note: what makes the line incomparable with the others.
    """

    name: str
    measure: str
    nats: float
    bits: float
    note: str = ""

    def cells(self) -> list[str]:
        """The line as text."""
        measure = f"{self.measure} ({self.note})" if self.note else self.measure
        return [self.name, measure, f"{self.nats:.4f}", "-" if math.isnan(self.bits) else f"{self.bits:.4f}"]


def results(history: History) -> list[Result]:
    """The lines of the table, in the order of the runs, then what was made of them."""
    converted = history.validated
    lines = []
    for track in history.tracks:
        prefix = f"{track.name}: " if len(converted) > 1 else ""
        lines += [_base(track)] if track.is_autoregressive else _of_track(track, prefix)
    reference = rank(_validations(converted[-1])).reference if converted else None
    for folder in history.checkpoints:
        lines += _of_checkpoint(folder, folder.name, reference)
    return lines


def _validations(track: Track) -> dict[Path, Validation]:
    """By checkpoint, the newest last, what the runs of a track measured of those that are still there."""
    folders = [folder for run in track.runs for folder in list_checkpoints(run.folder / CHECKPOINTS)]
    return {folder: found for folder in folders if (found := read_validation(folder)) is not None}


def target_size(records: list[Record]) -> str | None:
    """The block size that validations rank by: the first one that the last validation of a diffusion stage gives."""
    sizes = [key.removeprefix(_ELBO) for record in reversed(records) for key in record if key.startswith(_ELBO)]
    return next((size for size in sizes if size.isdigit()), None)


def _measure(size: str) -> str:
    return f"ELBO, block {size}" if size.isdigit() else "exact NLL"


def _line(name: str, size: str, record: Record, note: str = "") -> Result:
    return Result(name, _measure(size), number(record.get(_ELBO + size)), number(record.get(_BITS + size)), note)


def _base(track: Track) -> Result:
    return _line(f"AR {track.name}", "ar", track.validations[-1])


def _of_track(track: Track, prefix: str) -> list[Result]:
    size = target_size(track.validations)
    if size is None:
        return []
    lines = []
    for record in track.validations:
        if record.get("is_stage_end") and _ELBO + size in record:
            is_start = record.get("step") == 0
            name = prefix + ("before training" if is_start else f"after {record.get('stage')}")
            lines.append(_line(name, size, record, difference(record, track.validations[-1])))
    ranked = rank(_validations(track))
    if ranked.scores:
        best = ranked.scores[0][1]
        lines += _of_checkpoint(best, f"{prefix}best checkpoint ({best.name})", None)
    return lines


def _of_checkpoint(folder: Path, name: str, reference: Validation | None) -> list[Result]:
    """The line of a checkpoint.

    Args:
        folder: of the checkpoint.
        name: that the line has.
        reference: the measurement that it is read beside; None: any.
    """
    validation = read_validation(folder)
    if validation is None:
        return []
    size = str(validation.target_block_size or "ar")
    if size not in validation.nats_per_token:
        return []
    note = validation.difference(reference) if reference is not None else ""
    bits = number(validation.bits_per_byte.get(size))
    return [Result(name, _measure(size), validation.nats_per_token[size], bits, note)]

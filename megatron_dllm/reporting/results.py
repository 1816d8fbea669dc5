"""The table of results: what was measured of each model, in nats per token and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dllm.checkpoint.folder import list_checkpoints
from megatron_dllm.checkpoint.ranking import rank
from megatron_dllm.checkpoint.validation import Validation, read_validation
from megatron_dllm.reporting.held_out import conditions_in, difference, is_same_text
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
    """The lines of the table, in the order of the runs, then what was made of them.

    A line that was measured otherwise than the newest run's last says so; an exact NLL only where the text is another.
    """
    converted = history.validated
    lines = []
    for track in history.tracks:
        prefix = f"{track.name}: " if len(converted) > 1 else ""
        newest = (converted[-1] if converted else track).validations
        lines += [_base(track, newest)] if track.is_autoregressive else _of_track(track, prefix, newest)
    reference = rank(_validations(converted[-1])).reference if converted else None
    for folder in history.checkpoints:
        lines += _of_checkpoint(folder, folder.name, reference)
    return lines


def drawn_beside(track: Track, history: History) -> tuple[dict[str, dict[str, float]], float | None]:
    """What may be drawn beside the validations of a track, since it was measured on the same text.

    Args:
        track: with validations.
        history: that it belongs to.

    Returns:
        By name the merges of the newest track, each by block size; and the exact NLL of an AR base, if there is one.
    """
    newest = track.validations[-1]
    checkpoints, ar_nll = {}, None
    if track in history.validated[-1:]:
        found = {folder.name: read_validation(folder) for folder in history.checkpoints}
        measured = {name: value for name, value in found.items() if value and is_same_text(newest, value)}
        checkpoints = {name: dict(validation.nats_per_token) for name, validation in measured.items()}
    if not track.is_autoregressive:
        bases = [base.validations[-1] for base in history.tracks if base.is_autoregressive and base.validations]
        ar_nll = next((number(base.get(f"{_ELBO}ar")) for base in bases if is_same_text(newest, base)), None)
    return checkpoints, ar_nll


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


def _base(track: Track, newest: Sequence[Record]) -> Result:
    record = track.validations[-1]
    note = difference(record, newest[-1]) if newest and not is_same_text(record, newest[-1]) else ""
    return _line(f"AR {track.name}", "ar", record, note)


def _of_track(track: Track, prefix: str, newest: Sequence[Record]) -> list[Result]:
    size = target_size(track.validations)
    if size is None:
        return []
    lines = []
    for record in track.validations:
        if record.get("is_stage_end") and _ELBO + size in record:
            is_start = record.get("step") == 0
            name = prefix + ("before training" if is_start else f"after {record.get('stage')}")
            lines.append(_line(name, size, record, difference(record, newest[-1])))
    ranked = rank(_validations(track))
    if ranked.scores:
        best = ranked.scores[0][1]
        conditions = conditions_in(newest[-1])
        reference = None if conditions is None else Validation({}, conditions=conditions)
        lines += _of_checkpoint(best, f"{prefix}best checkpoint ({best.name})", reference)
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

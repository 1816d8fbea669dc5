"""The table of what runs on a device: part, implementation, why, and what would be faster there and how to have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from megatron_dllm.config import TrainConfig
from megatron_dllm.model.paths import Choice, Paths, choose_paths
from megatron_dllm.parallel.device import DeviceFacts, local_device
from megatron_dllm.training.self_check import check_paths

_HEAD = ("part", "what runs", "why", "faster, and how to have it")


def paths_report(config: TrainConfig, facts: DeviceFacts | None = None) -> str:
    """The table, and below it what was compared with the plain computation.

    Args:
        config: of a run.
        facts: of another device, on which nothing can be compared; None: of this process's.

    Raises:
        ValueError: what is asked for cannot run there.
        RuntimeError: a path gives other numbers than the plain one.
    """
    backend = config.training.attention_backend
    paths = choose_paths(config.model, config.parallel, facts or DeviceFacts.here(), backend, True, config.optimizer)
    lines = _aligned([_HEAD, *_rows(paths)])
    if facts is None:
        checked = ", ".join(check_paths(paths, config, local_device())) or "nothing that runs here"
        lines.append(f"compared with the plain computation, and equal: {checked}")
    return "\n".join(lines)


def _rows(paths: Paths) -> list[tuple[str, str, str, str]]:
    choices: list[tuple[str, Choice]] = [(field.name, getattr(paths, field.name)) for field in fields(paths)]
    return [(part, choice.name, choice.reason, choice.faster) for part, choice in choices]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

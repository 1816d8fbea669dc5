"""Write a benchmark's results: the machine, the command and the tables, as JSON and as Markdown."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_dllm.run.code_version import ROOT, git
from megatron_dllm.run.files import write_json, write_text

RESULTS = ROOT / "benchmarks" / "results"

Rows = Sequence[Mapping[str, Any]]


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """The machine that gave the numbers (its CPU unless a device is given), and the command."""
    name = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else _cpu_name()
    commit = (git("rev-parse", "--short", "HEAD") or "").strip()
    return dict(
        device=name,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        megatron_core=version("megatron-core"),
        commit=commit,
        date=time.strftime("%Y-%m-%d"),
        command=command_line(),
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def command_line() -> str:
    """The command that runs this program again, from the repository's root."""
    spec = sys.modules["__main__"].__spec__
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else os.path.relpath(sys.argv[0], ROOT)
    return " ".join(["python", program, *sys.argv[1:]])


def origin() -> str:
    """Where the numbers of a study come from, in one sentence."""
    about = machine()
    where = ", ".join(str(about[name]) for name in ("device", "date"))
    return f"{where}, commit {about['commit']}, torch {about['torch']}: `{about['command']}`."


def table(rows: Rows) -> str:
    """Rows as a Markdown table under the keys of the first; floats to three digits."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in rows[0]) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def markdown(title: str, about: Mapping[str, Any], tables: Mapping[str, Rows], note: str = "") -> str:
    """The page of a benchmark; tables have headings if there is more than one."""
    parts = [f"# {title}\n"]
    parts.append(
        "".join(f"- {name}: {f'`{value}`' if name == 'command' else value}\n" for name, value in about.items())
    )
    if note:
        parts.append(note + "\n")
    for name, rows in tables.items():
        if rows:
            parts += [f"## {name}\n"] if len(tables) > 1 else []
            parts.append(table(rows))
    return "\n".join(parts)


def write_results(
    output: Path, title: str, about: Mapping[str, Any], tables: Mapping[str, Rows], note: str = ""
) -> None:
    """Write `output`.json and `output`.md.

    Args:
        output: without suffix.
        title: of the page.
        about: `machine` and the settings worth naming.
        tables: name -> rows with the same keys.
        note: what the columns mean.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output.with_suffix(".json"), {"about": about, **tables})
    write_text(output.with_suffix(".md"), markdown(title, about, tables, note))

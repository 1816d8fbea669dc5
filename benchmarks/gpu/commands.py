"""Starts the product's commands as a user would, on a machine where nothing was installed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.settings import Settings
from megatron_dllm.run.code_version import ROOT
from megatron_dllm.run.place import without_place

# The frame ends a part after one and a half times its seconds; a command ends before, so that its row is written.
LAST_SHARE = 1.4
# Characters of a command's last words that an error keeps.
LAST_WORDS = 1500


def run_command(settings: Settings, log: Path, words: Sequence[object], device: str | None = None) -> float:
    """Run `python -m WORDS` to its end; returns its wall seconds.

    Args:
        settings: of the part: device and time limit.
        log: file for what the command says.
        words: the module, and its arguments.
        device: cpu or cuda; None: the part's.

    Raises:
        RuntimeError: it failed; with its last words.
        TimeoutError: the part's time, and the grace that it has, went by.
    """
    started = time.perf_counter()
    limit = max(1.0, LAST_SHARE * settings.seconds - (time.monotonic() - settings.started))
    run = settings.run or run_program
    try:
        code = run([str(word) for word in words], log, environment(device or settings.device), limit)
    except TimeoutError:
        raise TimeoutError(f"{words[0]} was not done after {limit:.0f} s; it said {_end(log)}") from None
    if code:
        raise RuntimeError(f"{words[0]} ended with {code}: {_end(log)}")
    return time.perf_counter() - started


def run_program(words: Sequence[str], log: Path, environment: Mapping[str, str], seconds: float) -> int:
    """Run `python -m WORDS` as a program of its own; its exit code.

    Raises:
        TimeoutError: it was not done in time.
    """
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=environment,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
    return done.returncode


def environment(device: str) -> dict[str, str]:
    """That of a command: this checkout's code, no GPU for the CPU, and fp32 products that are fp32.

    Compilers share the cores: several commands may run beside each other.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    changes = {"PYTHONPATH": path, "NVIDIA_TF32_OVERRIDE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    if device == "cpu":
        changes["CUDA_VISIBLE_DEVICES"] = ""
    return without_place(os.environ) | changes


def _end(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace").strip()[-LAST_WORDS:]

"""Wall time and peak memory of commands that read and write large files, from a cold page cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.name_table import weight_map


@dataclass(frozen=True)
class Measurement:
    """One command.

    Attributes:
        seconds: wall time.
        peak_rss: largest resident memory of one of its processes, in bytes.
    """

    seconds: float
    peak_rss: int


def evict(*folders: Path) -> None:
    """Flush the files to the disk and drop them from the page cache."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def run(command: list[str]) -> Measurement:
    """Run a command to its end; raise if it fails."""
    peaks: dict[int, int] = {}
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            # Not getrusage: it would count this process's own memory, from before the new program was loaded.
            for pid in [process.pid, *_children(process.pid)]:
                peaks[pid] = max(peaks.get(pid, 0), _peak_rss(pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read().decode(errors='replace')[-2000:]}")
    return Measurement(seconds, max(peaks.values()))


def _children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _peak_rss(pid: int) -> int:
    """The kernel's own high-water mark of a process, in bytes; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def tool(name: str, *arguments: object) -> list[str]:
    """Command line of one of the checkpoint tools."""
    return [sys.executable, "-m", f"checkpoints_tools.{name}", *map(str, arguments)]


def shell(script: str) -> list[str]:
    """Command line of a shell script that stops at the first error."""
    return ["bash", "-ec", script]


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def model_of_size(num_bytes: float, family: str = "bailing_moe") -> ModelConfig:
    """A model of about `num_bytes` in bf16, with the layers of Ling-mini (`qwen3`: Qwen3-8B) if it is large enough."""
    is_small = num_bytes < 4e9
    vocabulary = 8192 if is_small else 157184
    tokens = {"mask_token_id": 2, "eos_token_id": 0, "pad_token_id": 1}

    def build(num_layers: int) -> ModelConfig:
        if family == "qwen3":
            hidden = 512 if num_bytes < 1.5e9 else 4096
            return ModelConfig(
                family=family,
                num_layers=num_layers,
                hidden_size=hidden,
                ffn_hidden_size=3 * hidden,
                num_attention_heads=hidden // 128,
                num_query_groups=hidden // 512,
                kv_channels=128,
                vocab_size=vocabulary,
                rotary_percent=1.0,
                rotary_base=1e6,
                **tokens,
            )
        return ModelConfig(
            family=family,
            num_layers=num_layers,
            hidden_size=2048,
            ffn_hidden_size=5120,
            num_attention_heads=16,
            num_query_groups=4,
            kv_channels=128,
            vocab_size=vocabulary,
            num_dense_layers=1,
            num_moe_experts=16 if is_small else 256,
            moe_ffn_hidden_size=512,
            moe_shared_expert_intermediate_size=512,
            moe_router_topk=8,
            moe_router_num_groups=8,
            moe_router_group_topk=4,
            moe_router_topk_scaling_factor=2.5,
            **tokens,
        )

    def bytes_of(num_layers: int) -> int:
        return 2 * sum(prod(shape) for shape in weight_map(build(num_layers)).hf_shapes.values())

    per_layer = bytes_of(3) - bytes_of(2)
    return build(max(2, 2 + round((num_bytes - bytes_of(2)) / per_layer)))

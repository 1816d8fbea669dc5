"""Commands of the acceptance run: their limit, what a failed one says, and their environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.commands import environment, run_command
from benchmarks.gpu.settings import Settings


@pytest.mark.ranks
def test_a_command_ends_with_the_grace_of_its_part(tmp_path: Path) -> None:
    words = ("timeit", "-n", "1", "-r", "1", "import time; print('begun', flush=True); time.sleep(60)")
    with pytest.raises(TimeoutError, match="timeit was not done after 4 s"):
        run_command(Settings("cpu", True, tmp_path, 3.0), tmp_path / "log", words)


@pytest.mark.ranks
def test_a_failed_command_says_its_last_words(tmp_path: Path) -> None:
    settings = Settings("cpu", True, tmp_path, 60.0)
    with pytest.raises(RuntimeError, match=r"(?s)timeit ended with 1: .*ZeroDivisionError"):
        run_command(settings, tmp_path / "log", ("timeit", "-n", "1", "1 / 0"))


def test_a_cpu_sees_no_gpu_and_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = environment("cpu")
    assert found["CUDA_VISIBLE_DEVICES"] == "" and "RANK" not in found
    assert found["PYTHONPATH"].endswith("/elsewhere") and found["PYTHONPATH"] != "/elsewhere"

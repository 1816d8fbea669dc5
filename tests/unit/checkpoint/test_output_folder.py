"""An output folder is complete or absent, also when the process is told to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dllm.checkpoint.output_folder import output_folder
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED
from tests.tiny_models import left_in


def test_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with output_folder(tmp_path / "deep" / "out", 10) as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "x"
    assert left_in(tmp_path / "deep") == {"out"}


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    with output_folder(tmp_path / "out", 10) as folder:
        (folder / "tokenizer").mkdir()
        for name in ("config.json", "tokenizer/tokenizer.json"):
            (folder / name).write_text("{}")
    assert {path.stat().st_ino for path in (tmp_path / "out").rglob("*")} <= synced


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), output_folder(tmp_path / "out", 10):
        raise error
    assert left_in(tmp_path) == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    previous = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped, output_folder(tmp_path / "out", 10) as folder:
        (folder / "file").write_text("x")
        os.kill(os.getpid(), number)
    assert stopped.value.code == EXIT_PREEMPTED
    assert left_in(tmp_path) == set()
    assert signal.getsignal(number) == previous


_TOOL = """
import sys, time
from pathlib import Path
from megatron_dllm.checkpoint.output_folder import output_folder
with output_folder(Path(sys.argv[1]), 10) as folder:
    (folder / "file").write_text("x")
    time.sleep(60)
"""


@pytest.mark.ranks
def test_a_tool_stopped_by_its_launcher_leaves_nothing(tmp_path: Path) -> None:
    """The wrapper of a rank turns SIGTERM into SIGUSR1, which its command first ignores."""
    start, work = tmp_path / "start", tmp_path / "work"
    start.mkdir(), work.mkdir()
    wrapper = subprocess.Popen(
        [sys.executable, "launch/rank.py", str(start), "--", sys.executable, "-c", _TOOL, str(work / "out")],
        env={**os.environ, "PYTHONPATH": "."},
    )
    while not any(work.glob(".out.incomplete-*/file")):
        assert wrapper.poll() is None
        time.sleep(0.05)
    wrapper.send_signal(signal.SIGTERM)
    assert wrapper.wait(20) == 0
    assert json.loads((start / "exit_00000.json").read_text())["code"] == EXIT_PREEMPTED
    assert left_in(work) == set()


@pytest.mark.ranks
def test_what_a_killed_writer_left_is_removed_where_it_ran(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {pid: f".out.incomplete-{socket.gethostname()}-{pid}-0a" for pid in (ended.pid, os.getpid())}
    other_host = f".out.incomplete-other-host-{ended.pid}-0a"
    for name in (*names.values(), other_host):
        (tmp_path / name).mkdir()
    with output_folder(tmp_path / "out", 10):
        pass
    assert left_in(tmp_path) == {"out", names[os.getpid()], other_host}


def test_refuses_to_replace_what_appeared_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="appeared while writing"), output_folder(tmp_path / "out", 10):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")
    assert (tmp_path / "out" / "theirs").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file"), output_folder(tmp_path / "file" / "out", 10):
        pass

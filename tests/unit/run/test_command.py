"""How a command begins and ends. Each test starts small commands, which import nothing slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_dllm.run.command import sentence
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED, EXIT_REFUSED

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).resolve().parents[3]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def start(body: str, *words: object, **settings: Any) -> subprocess.Popen[str]:
    """A command whose `work` has this body."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    code = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from megatron_dllm.run.command import leaving_at_once, listen, run_command, uninterrupted\n"
        f"def work():\n{lines}\nrun_command(work)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings.pop("env", {})}
    for name in ("RANK", "WORLD_SIZE", "PYTHONIOENCODING", "PYTHONUTF8"):
        environment.pop(name, None)
    pipe = subprocess.PIPE
    arguments: dict[str, Any] = {"stdout": pipe, "stderr": pipe, "text": True, "encoding": "utf-8", **settings}
    words = tuple(map(str, words))
    return subprocess.Popen([sys.executable, "-S", "-c", code, *words], env=environment, **arguments)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out or "", err or ""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("print('done')", (0, "done\n", "")),
        ("return 1", (1, "", "")),
        ("raise ValueError('a (1) must be 2; use 2.')", (EXIT_REFUSED, "", "error: a (1) must be 2; use 2.\n")),
        ("open('/nowhere/x')", (EXIT_REFUSED, "", "error: /nowhere/x: No such file or directory\n")),
        ("sys.exit(7)", (7, "", "")),
    ],
)
def test_a_command_says_by_its_code_how_it_ended(body: str, expected: tuple[int, str, str]) -> None:
    assert ended(start(body)) == expected


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    code, _, err = ended(start("raise KeyError('x')"))
    assert code == 1 and "Traceback" in err


def test_output_that_cannot_be_written_is_named_and_a_reader_that_has_gone_is_not() -> None:
    with open("/dev/full", "w") as full:
        assert ended(start("print('x')", stdout=full)) == (EXIT_REFUSED, "", "error: No space left on device\n")
    code, _, err = ended(start("print('x' * 10**6)\nprint('y' * 10**6)", stdout=_closed_pipe()))
    assert (code, err) == (128 + signal.SIGPIPE, "")


def _closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_cleans_up_once_and_ends_with_its_code(number: signal.Signals, tmp_path: Path) -> None:
    body = """
try:
    Path(sys.argv[1], "begun").touch()
    time.sleep(60)
finally:
    Path(sys.argv[1], "cleaning").touch()
    time.sleep(0.5)
    Path(sys.argv[1], "begun").unlink()
    raise RuntimeError("what comes of stopping is not told")
"""
    process = start(body, tmp_path)
    wait_for(tmp_path / "begun")
    process.send_signal(number)
    wait_for(tmp_path / "cleaning")
    process.send_signal(number)
    assert ended(process) == (EXIT_PREEMPTED, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["cleaning"]


def test_moments_that_must_not_be_cut_are_finished(tmp_path: Path) -> None:
    body = "with uninterrupted():\n    Path(sys.argv[1], 'begun').touch(); time.sleep(0.5)\nprint('whole')"
    process = start(body, tmp_path)
    wait_for(tmp_path / "begun")
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, "whole\n", "")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_among_the_imports_ends_the_process(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom megatron_dllm.run.command import listen\nlisten()\n"
        "Path(sys.argv[1]).touch()\ntry:\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", code, str(tmp_path / "begun")], cwd=ROOT)
    wait_for(tmp_path / "begun")
    process.send_signal(number)
    assert process.wait(30) == EXIT_PREEMPTED


def test_a_process_that_waits_inside_a_library_ends_too(tmp_path: Path) -> None:
    """The lock is taken in C, which returns to Python for nothing but the lock."""
    body = """
import ctypes
with leaving_at_once():
    Path(sys.argv[1], "begun").touch()
    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(30)
"""
    process = start(body, tmp_path)
    wait_for(tmp_path / "begun")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == EXIT_PREEMPTED and time.monotonic() - began < 20


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "no_SUCH.locale"}, {}])
def test_no_character_ends_a_command(locale: dict[str, str]) -> None:
    text = "é π 日本 \\U0001f600"
    code, out, err = ended(start(f"print('{text} \\udce9'); print('{text}', file=sys.stderr)", env=locale))
    assert code == 0 and out == "é π 日本 😀 \\udce9\n" and err == "é π 日本 😀\n"


def test_streams_that_are_closed_end_no_command(tmp_path: Path) -> None:
    process = start("print('x'); print('y', file=sys.stderr)", preexec_fn=_close_streams)
    assert ended(process) == (0, "", "")


def _close_streams() -> None:
    os.close(1)
    os.close(2)


def test_whatever_the_umask_a_command_reads_what_it_writes(tmp_path: Path) -> None:
    body = "Path(sys.argv[1], 'file').write_text('x')\nPath(sys.argv[1], 'folder').mkdir()"
    assert ended(start(body, tmp_path, umask=0o777)) == (0, "", "")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"file": 0o600, "folder": 0o700}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PermissionError(13, "Permission denied", "/a"), "/a: Permission denied"),
        (OSError(18, "Invalid cross-device link", "/a", None, "/b"), "/a -> /b: Invalid cross-device link"),
        (OSError("writing x: no room"), "writing x: no room"),
    ],
)
def test_a_sentence_names_the_file_first(error: OSError, text: str) -> None:
    assert sentence(error) == text

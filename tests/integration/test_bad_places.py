"""Where commands read and write: places that cannot be, disks that fill up. One sentence each, nothing left behind."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.synthetic import write_synthetic
from checkpoints_tools import hf_to_mcore
from megatron_dllm.run.command import sentence
from tests.full_disk import full_disk
from tests.tiny_models import LING, left_in
from tests.unit.hf.test_tokenizer_folder import make_tokenizer

MODEL = replace(LING, eos_token_id=3, pad_token_id=4, mask_token_id=5)


@dataclass(frozen=True)
class Inputs:
    """What the commands below work on: a folder of text, a tokenizer, an HF folder and its conversion."""

    text: Path
    tokenizer: Path
    hf: Path
    mcore: Path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("sound")
    inputs = Inputs(root / "text.txt", root / "tokenizer", root / "hf", root / "mcore")
    inputs.text.write_text("a few words, again and again\n" * 300)
    make_tokenizer(inputs.tokenizer, {"<eos>": 3, "<pad>": 4, "<|mask|>": 5}, mask="<|mask|>")
    write_synthetic(inputs.hf, MODEL)
    config = json.loads((inputs.hf / "config.json").read_text())
    diffusion = {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "block_length": 8}
    (inputs.hf / "config.json").write_text(json.dumps(config | diffusion))
    shutil.copytree(inputs.tokenizer, inputs.hf, dirs_exist_ok=True)
    hf_to_mcore.convert(inputs.hf, inputs.mcore)
    return inputs


# What commands read and write; {bad} is what is wrong with it.
WRITERS = {
    "tokenize": "megatron_dllm.data.tokenize --input {text} --tokenizer {tokenizer} --num_workers 1 --output {bad}",
    "hf_to_mcore": "checkpoints_tools.hf_to_mcore --hf {hf} --output {bad}",
    "mcore_to_hf": "checkpoints_tools.mcore_to_hf --checkpoint {mcore} --output {bad}",
    "merge_topk": "checkpoints_tools.merge_topk --checkpoints {mcore} {mcore} --output {bad}",
    "generate": "megatron_dllm.generate checkpoint={mcore} prompt=a max_new_tokens=8 output={bad}",
}
READERS = {
    "tokenize": "megatron_dllm.data.tokenize --input {bad} --tokenizer {tokenizer} --num_workers 1 --output {out}",
    "tokenizer": "megatron_dllm.data.tokenize --input {text} --tokenizer {bad} --num_workers 1 --output {out}",
    "hf_to_mcore": "checkpoints_tools.hf_to_mcore --hf {bad} --output {out}",
    "its tokenizer": "checkpoints_tools.hf_to_mcore --hf {hf} --tokenizer {bad} --output {out}",
    "mcore_to_hf": "checkpoints_tools.mcore_to_hf --checkpoint {bad} --output {out}",
    "tokenizer of mcore_to_hf": "checkpoints_tools.mcore_to_hf --checkpoint {mcore} --tokenizer {bad} --output {out}",
    "merge_topk": "checkpoints_tools.merge_topk --checkpoints {mcore} {bad} --output {out}",
    "merge_topk of a run": "checkpoints_tools.merge_topk --run {bad} --output {out}",
    "compare": "checkpoints_tools.compare {mcore} {bad}",
    "inspect": "checkpoints_tools.inspect {bad}",
    "report": "megatron_dllm.report {bad} --output {out}",
    "replay": "megatron_dllm.replay {bad}",
    "generate": "megatron_dllm.generate checkpoint={bad} prompt=a output={out}",
    "prompts": "megatron_dllm.generate checkpoint={mcore} prompts_file={bad} output={out}",
}
BAD_INPUTS = ("nothing", "an empty folder", "an empty file", "zeros", "a dead link", "a link to itself", "a named pipe")
BAD_OUTPUTS = (
    "on a file",
    "below a file",
    "below a link to itself",
    "below a device",
    "in a folder of the kernel",
    "a name too long",
)


def _bad_input(kind: str, folder: Path) -> Path:
    path = folder / "bad"
    make = {
        "nothing": lambda: None,
        "an empty folder": path.mkdir,
        "an empty file": path.touch,
        "zeros": lambda: path.write_bytes(bytes(4096)),
        "a dead link": lambda: path.symlink_to(folder / "gone"),
        "a link to itself": lambda: path.symlink_to(path),
        "a named pipe": lambda: os.mkfifo(path),
    }
    make[kind]()
    return path


def _bad_output(kind: str, folder: Path) -> Path:
    (folder / "file").write_text("mine")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "on a file": folder / "file",
        "below a file": folder / "file" / "out",
        "below a link to itself": folder / "loop" / "out",
        "below a device": Path("/dev/null/out"),
        "in a folder of the kernel": Path("/proc/out"),
        "a name too long": folder / ("n" * 300),
    }[kind]


def _refusal(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a command in this process and return its sentence; anything but a user's mistake comes out as it is.

    Nothing may be left in the folder that was not there before.
    """
    module, *arguments = command.split(" ")
    monkeypatch.setattr("sys.argv", [module, *arguments])
    before = left_in(folder)
    with _at_most(60), pytest.raises((ValueError, OSError)) as caught:
        importlib.import_module(module).main()
    message = sentence(caught.value)
    assert message and "\n" not in message
    assert left_in(folder) == before
    return message


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """A command that waits for ever fails its test."""

    def too_long(*_: object) -> None:
        raise TimeoutError  # an OSError, but with no sentence

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    ("name", "kind"),
    # a corpus is a prefix: file.bin and file.idx may stand beside a file
    [(name, kind) for name in WRITERS for kind in BAD_OUTPUTS if (name, kind) != ("tokenize", "on a file")],
)
def test_a_place_that_cannot_be_written_is_one_sentence(
    name: str, kind: str, sound: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = _bad_output(kind, tmp_path)
    _refusal(WRITERS[name].format(**vars(sound), bad=bad), tmp_path, monkeypatch)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "kind"),
    # zero bytes are a text, of control characters
    [(name, kind) for name in READERS for kind in BAD_INPUTS if (name, kind) != ("prompts", "zeros")],
)
def test_what_cannot_be_read_is_one_sentence(
    name: str, kind: str, sound: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = _bad_input(kind, tmp_path)
    message = _refusal(READERS[name].format(**vars(sound), bad=bad, out=tmp_path / "out"), tmp_path, monkeypatch)
    assert str(bad) in message


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_leaves_nothing_behind(
    name: str, sound: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tokenized text and answers are small; both are written in parts
    limit = {"tokenize": 2000, "generate": 0}.get(name, 4000)
    with full_disk(limit):
        message = _refusal(WRITERS[name].format(**vars(sound), bad=tmp_path / "out"), tmp_path, monkeypatch)
    assert str(tmp_path) in message

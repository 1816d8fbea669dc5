"""Checkpoint folders that are not what they should be: what exports or averages them refuses each in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

from benchmarks.synthetic import write_synthetic
from checkpoints_tools import hf_to_mcore, mcore_to_hf, merge_topk
from megatron_dllm.run.command import sentence
from megatron_dllm.run.names import CONTRACT, MANIFEST
from tests.tiny_models import LING, left_in, seal

Change = Callable[[Path], object]
NORM, EXPERTS = "decoder.final_layernorm.weight", "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
SHARD = "__0_0.distcp"
TOOLS = {
    "mcore_to_hf": (mcore_to_hf, "--checkpoint {bad} --output {out}"),
    "merge_topk": (merge_topk, "--checkpoints {sound} {bad} --output {out}"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is exported and averaged."""
    root = tmp_path_factory.mktemp("sound")
    write_synthetic(root / "hf", LING)
    hf_to_mcore.convert(root / "hf", root / "checkpoint")
    return root / "checkpoint"


def _content(name: str, content: bytes | str) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def _gone(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def _instead(name: str, make: Callable[[Path], object]) -> Change:
    """Something else under the name of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def _bytes(name: str, edit: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def _flip(name: str, place: int) -> Change:
    """Another bit at a place, counted from the end where it is negative."""
    return _bytes(name, lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place:][1:])


def _json(name: str, part: str | None = None, **changes: Any) -> Change:
    """Other values in a JSON file or an object of it; ... removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        table = content[part] if part else content
        table.update(changes)
        for key in [key for key, value in table.items() if value is ...]:
            del table[key]
        (folder / name).write_text(json.dumps(content))

    return change


def _contract(part: str | None = None, **changes: Any) -> Change:
    return _sealed(_json(CONTRACT, part, **changes))


def _sealed(change: Change) -> Change:
    """A folder that was written so: its manifest knows no other."""

    def sealed(folder: Path) -> None:
        change(folder)
        seal(folder)

    return sealed


def _table(edit: Callable[[Metadata], object]) -> Change:
    """Another table of contents of the same tensors."""

    def change(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        edit(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return _sealed(change)


def _place(**changes: Any) -> Change:
    """Another place of a tensor's bytes."""

    def edit(metadata: Metadata) -> None:
        place = next(value for index, value in metadata.storage_data.items() if index.fqn == NORM)
        for name, value in changes.items():
            setattr(place, name, value)

    return _table(edit)


def _tensor(key: str, **changes: Any) -> Change:
    def edit(metadata: Metadata) -> None:
        for name, value in changes.items():
            setattr(metadata.state_dict_metadata[key], name, value)

    return _table(edit)


def _dtype(dtype: torch.dtype) -> Change:
    return _tensor(NORM, properties=TensorProperties(dtype=dtype))


def _renamed(key: str, other: str) -> Change:
    def edit(metadata: Metadata) -> None:
        metadata.state_dict_metadata[other] = metadata.state_dict_metadata.pop(key)
        for index in [index for index in metadata.storage_data if index.fqn == key]:
            place = metadata.storage_data.pop(index)
            metadata.storage_data[type(index)(other, index.offset, index.index)] = place

    return _table(edit)


def _dropped(key: str) -> Change:
    def edit(metadata: Metadata) -> None:
        for index in [index for index in metadata.storage_data if index.fqn == key]:
            del metadata.storage_data[index]

    return _table(edit)


def _half(key: str) -> Change:
    """A tensor of which a part was never written."""

    def edit(metadata: Metadata) -> None:
        del metadata.state_dict_metadata[key].chunks[1:]

    return _table(edit)


def _replaced(make: Change) -> Change:
    """Another folder in place of the checkpoint."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        make(folder)

    return change


def _of_torch(folder: Path) -> None:
    """What another program leaves that saves by torch.distributed.checkpoint."""
    dcp.save({"model": {"weight": torch.ones(3)}}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def _of_megatron(folder: Path) -> None:
    """What Megatron-LM leaves."""
    _of_torch(folder / "iter_0000100")
    (folder / "iter_0000100" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


def _of_zarr(folder: Path) -> None:
    folder.mkdir()
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    (folder / "decoder.weight").mkdir()


def _run_of_nothing(folder: Path) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step_0000100\n")


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch /tmp/megatron_dllm_bad_checkpoint",))


CASES: dict[str, tuple[Change, str]] = {
    # the files of tensors
    "shard missing": (_gone(SHARD), f"{SHARD} is missing"),
    "shard empty": (_content(SHARD, b""), f"{SHARD} has 0 bytes instead of"),
    "shard truncated": (_bytes(SHARD, lambda data: data[:-100]), f"{SHARD} has"),
    "shard too long": (_bytes(SHARD, lambda data: data + b"x"), f"{SHARD} has"),
    "shard altered": (_flip(SHARD, -2000), f"{SHARD} does not have the checksum"),
    "shard altered at its beginning": (_flip(SHARD, 0), f"{SHARD} does not have the checksum"),
    "shard a folder": (_instead(SHARD, Path.mkdir), SHARD),
    "shard a dead link": (_instead(SHARD, lambda path: path.symlink_to("../none")), f"{SHARD} is missing"),
    "shard a link to itself": (_instead(SHARD, lambda path: path.symlink_to(path)), SHARD),
    "shard a pipe": (_instead(SHARD, os.mkfifo), SHARD),
    "shard missing, and unknown to the manifest": (_sealed(_gone(SHARD)), f"{SHARD} is missing"),
    "shard truncated, and so in the manifest": (
        _sealed(_bytes(SHARD, lambda data: data[:3000])),
        f"{SHARD} is truncated",
    ),
    "shard of zeros, and so in the manifest": (_sealed(_bytes(SHARD, lambda data: bytes(len(data)))), "is damaged"),
    "shard of text, and so in the manifest": (
        _sealed(_bytes(SHARD, lambda data: b"text " * (len(data) // 5 + 1))),
        "is damaged",
    ),
    # the table of contents
    "table missing": (_gone(".metadata"), ".metadata is missing"),
    "table missing, and unknown to the manifest": (_sealed(_gone(".metadata")), ".metadata is missing"),
    "table empty": (_sealed(_content(".metadata", b"")), ".metadata is not the metadata"),
    "table truncated": (_sealed(_bytes(".metadata", lambda data: data[: len(data) // 2])), ".metadata is not the"),
    "table of text": (_sealed(_content(".metadata", "{}")), ".metadata is not the metadata"),
    "table of another kind": (_sealed(_content(".metadata", pickle.dumps({"a": 1}))), ".metadata is not the metadata"),
    "table that runs code": (_sealed(_content(".metadata", pickle.dumps(_Evil()))), "system has no place"),
    "table altered": (_flip(".metadata", 3000), ".metadata"),
    "table without tensors": (_table(lambda metadata: metadata.state_dict_metadata.clear()), "are missing|is in"),
    "table without places": (_table(lambda metadata: metadata.storage_data.clear()), "has no data for its part"),
    "place of another file": (_place(relative_path="__9_9.distcp"), "__9_9.distcp is missing"),
    "place outside of the folder": (_place(relative_path="../checkpoint/__0_0.distcp"), "is missing"),
    "place below zero": (_place(offset=-1), "is truncated"),
    "place behind the end": (_place(length=10**12), "is truncated"),
    "place of another tensor": (_place(offset=0), "is damaged|its shape"),
    # the tensors
    "tensor missing": (_renamed(NORM, "optimizer.exp_avg"), NORM),
    "tensor without bytes": (_dropped(NORM), "has no data for its part"),
    "tensor unknown": (_renamed(NORM, "decoder.final_layernorm.gain"), "decoder.final_layernorm"),
    "tensor of another shape": (_tensor(NORM, size=torch.Size([23])), "[23]"),
    "tensor that is longer than its parts": (_tensor(NORM, size=torch.Size([25])), "stored incompletely (24 of 25"),
    "tensor of no dimension": (_tensor(NORM, size=torch.Size([])), "[]"),
    "tensor in part": (_half(EXPERTS), "stored incompletely"),
    "tensor of whole numbers": (_dtype(torch.int16), NORM),
    "tensor of another precision": (_dtype(torch.float16), NORM),
    # what the checkpoint says of itself
    "contract missing": (_gone(CONTRACT), "contract.json is missing|holds no complete checkpoint"),
    "contract empty": (_sealed(_content(CONTRACT, "")), f"{CONTRACT} is damaged"),
    "contract a list": (_sealed(_content(CONTRACT, "[]")), f"{CONTRACT} is damaged"),
    "contract altered": (_json(CONTRACT, step=5), CONTRACT),
    "contract of a later format": (_contract(format=99), "format (99) is not"),
    "contract without a model": (_contract(model=...), "no object model"),
    "contract without a contract": (_contract(contract=...), "no object contract"),
    "contract with an unknown field": (_contract("model", num_layer=3), "num_layer"),
    "contract without a field": (_contract("model", hidden_size=...), "hidden_size"),
    "contract of text": (_contract("model", hidden_size="24"), "hidden_size"),
    "contract of fewer layers": (_contract("model", num_layers=2), "have no place in a|num_layers is"),
    "contract of another width": (_contract("model", hidden_size=32), "[40, 24]|hidden_size is"),
    "contract of another vocabulary": (_contract("model", vocab_size=48), "[40, 24]|vocab_size is"),
    "contract of another family": (_contract("model", family="falcon"), "family"),
    "contract of no block": (_contract("contract", block_size=0), "block_size"),
    "contract of no context": (_contract("contract", context_length=-1), "context_length"),
    # the manifest
    "manifest missing": (_gone(MANIFEST), "manifest.json is missing"),
    "manifest empty": (_content(MANIFEST, ""), "manifest.json is damaged"),
    "manifest a list": (_content(MANIFEST, "[]"), "manifest.json is damaged"),
    "manifest without sizes": (_json(MANIFEST, CONTRACT, size=...), "manifest.json is damaged"),
    "manifest of nothing": (_content(MANIFEST, "{}"), "manifest.json is damaged"),
    "manifest that names another file": (_json(MANIFEST, more={"size": 1, "sha256": "0"}), "more is missing"),
    # other things
    "format missing": (_sealed(_gone("metadata.json")), "metadata.json is missing"),
    "of torch": (_replaced(_of_torch), "contract.json is missing|holds no complete checkpoint"),
    "of Megatron-LM": (_replaced(_of_megatron), "contract.json is missing|holds no complete checkpoint"),
    "of zarr": (_replaced(_of_zarr), "contract.json is missing|holds no complete checkpoint"),
    "a run without checkpoints": (_replaced(_run_of_nothing), "contract.json is missing|holds no complete checkpoint"),
    "a file": (_replaced(lambda path: path.write_text("x")), "is no folder|holds no complete checkpoint"),
    "nothing": (shutil.rmtree, "is no folder|holds no complete checkpoint"),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("case", CASES)
def test_each_is_refused_in_one_sentence(
    case: str, tool: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run_command` makes exit code 2 and one line of a ValueError or OSError, and a traceback of anything else."""
    change, named = CASES[case]
    module, words = TOOLS[tool]
    bad, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(sound, bad)
    change(bad)
    before = left_in(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", *words.format(bad=bad, sound=sound, out=out).split(" ")])
    with pytest.raises((ValueError, OSError)) as refusal:
        module.main()
    said = sentence(refusal.value)
    assert any(part in said for part in named.split("|")), said
    assert str(bad) in said
    assert "\n" not in said and len(said) < 1000
    assert left_in(tmp_path) == before
    assert not Path("/tmp/megatron_dllm_bad_checkpoint").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_the_sound_one_is_not_refused(tool: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, words = TOOLS[tool]
    command = words.format(bad=sound, sound=sound, out=tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["", *command.split(" ")])
    module.main()
    assert left_in(tmp_path) == {"out"}

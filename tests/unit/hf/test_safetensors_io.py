"""Our reader and writer against the safetensors library, and damaged folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_dllm.hf.safetensors_io import INDEX_NAME, SafetensorsFolder, SafetensorsWriter, read_header

TENSORS = {
    "a.weight": torch.randn(5, 3).bfloat16(),
    "b.bias": torch.randn(7),
    "c": torch.arange(6).view(2, 3),
    "d": torch.randn(4, 4).half(),
}


def _read(folder: SafetensorsFolder, name: str) -> torch.Tensor:
    tensor = folder.tensors[name]
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    folder.read(name, 0, out.view(-1))
    return out


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    folder = SafetensorsFolder(tmp_path)
    assert all(torch.equal(_read(folder, name), value) for name, value in TENSORS.items())
    part = torch.empty(4, dtype=torch.bfloat16)
    folder.read("a.weight", 6, part)
    assert torch.equal(part, TENSORS["a.weight"].flatten()[6:10])


@pytest.mark.parametrize("max_bytes", [10**9, 60, 1])
def test_the_library_reads_what_we_wrote(tmp_path: Path, max_bytes: int) -> None:
    writer = SafetensorsWriter(
        tmp_path, {name: (value.dtype, tuple(value.shape)) for name, value in TENSORS.items()}, max_bytes
    )
    for name, value in reversed(TENSORS.items()):
        half = value.numel() // 2
        writer.write(name, half, value.flatten()[half:])
        writer.write(name, 0, value.flatten()[:half])
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {}
    for path in files:
        with safe_open(path, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    assert len(files) == {10**9: 1, 60: 3, 1: 4}[max_bytes]
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == sum(value.numel() * value.itemsize for value in TENSORS.values())
        assert {path.name for path in files} == set(index["weight_map"].values())


def test_wide_dtypes_come_first_so_that_all_are_aligned(tmp_path: Path) -> None:
    SafetensorsWriter(tmp_path, {"x": (torch.bfloat16, (3,)), "y": (torch.float32, (2,))}).close()
    assert all(
        tensor.start % tensor.dtype.itemsize == 0 for tensor in read_header(tmp_path / "model.safetensors").values()
    )


def test_reads_shards_with_and_without_index(tmp_path: Path) -> None:
    SafetensorsWriter(
        tmp_path, {name: (value.dtype, tuple(value.shape)) for name, value in TENSORS.items()}, 60
    ).close()
    with_index = SafetensorsFolder(tmp_path).tensors
    (tmp_path / INDEX_NAME).unlink()
    assert SafetensorsFolder(tmp_path).tensors == with_index


def _damage_header(data: bytes) -> bytes:
    return data[:20] + b"\xff" + data[21:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-3], "truncated"),
        (lambda data: data[:5], "no whole safetensors"),
        (lambda data: b"", "no whole"),
        (_damage_header, "corrupt"),
        (lambda data: data + b"xx", "2 bytes after"),
        (lambda data: data.replace(b'"shape":[7]', b'"shape":[6]'), "b.bias"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        SafetensorsFolder(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        "a",
        {"a": "F32"},
        {"a": []},
        {"a": {**ENTRY, "data_offsets": None}},
        {"a": {**ENTRY, "data_offsets": [0]}},
        {"a": {**ENTRY, "data_offsets": ["0", "8"]}},
        {"a": {**ENTRY, "shape": None}},
        {"a": {**ENTRY, "shape": ["2"]}},
        {"a": {**ENTRY, "shape": [-1, -2]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {**ENTRY, "dtype": ["F32"]}},
    ],
)
def test_headers_of_another_shape_are_refused(tmp_path: Path, header: object) -> None:
    encoded = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors.* (corrupt|dtype)"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": "a"}])
def test_indices_of_another_shape_are_refused(tmp_path: Path, index: object) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{INDEX_NAME} is (no safetensors index|damaged)"):
        SafetensorsFolder(tmp_path)


def test_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors")
    (tmp_path / INDEX_NAME).write_text(
        json.dumps({"weight_map": {"a.weight": "one.safetensors", "z": "two.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"two\.safetensors"):
        SafetensorsFolder(tmp_path)


def test_index_that_disagrees_with_the_shards(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"z": "one.safetensors"}}))
    with pytest.raises(ValueError, match="names tensor z"):
        SafetensorsFolder(tmp_path)


def test_index_may_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"z": "../two.safetensors"}}))
    with pytest.raises(ValueError, match="in the folder itself"):
        SafetensorsFolder(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors")
    save_file({"c": TENSORS["c"]}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="tensor c is also in one"):
        SafetensorsFolder(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        SafetensorsFolder(tmp_path)

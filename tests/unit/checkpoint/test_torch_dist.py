"""Reading boxes of any chunking, and refusing everything in `.metadata` that DCP does not write."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron_dllm.checkpoint.torch_dist_metadata import check_metadata
from megatron_dllm.checkpoint.torch_dist_read import TorchDistReader
from megatron_dllm.checkpoint.torch_dist_write import TorchDistWriter

VALUES = torch.arange(6 * 4 * 5, dtype=torch.float32).view(6, 4, 5)


def _write(folder: Path, boxes: list[tuple[tuple[int, int, int], tuple[int, int, int]]]) -> TorchDistReader:
    folder.mkdir()
    writer = TorchDistWriter(folder, max_file_bytes=1500)
    writer.add("x", torch.float32, (6, 4, 5))
    for offsets, sizes in boxes:
        writer.write("x", offsets, VALUES[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].clone())
    writer.close()
    return TorchDistReader(folder)


GRIDS = {
    "whole": [((0, 0, 0), (6, 4, 5))],
    "rows": [((e, 0, 0), (1, 4, 5)) for e in range(6)],
    "columns": [((0, 0, c), (6, 4, 1)) for c in range(5)],
    "uneven": [((0, 0, 0), (2, 4, 5)), ((2, 0, 0), (4, 1, 5)), ((2, 1, 0), (4, 3, 2)), ((2, 1, 2), (4, 3, 3))],
}


@pytest.mark.parametrize("grid", GRIDS)
def test_reads_any_box_of_any_grid(grid: str, tmp_path: Path) -> None:
    reader = _write(tmp_path / "checkpoint", GRIDS[grid])
    for offsets, sizes in [
        ((0, 0, 0), (6, 4, 5)),
        ((1, 0, 0), (1, 4, 5)),
        ((3, 1, 2), (2, 2, 2)),
        ((5, 3, 4), (1, 1, 1)),
    ]:
        out = torch.full((sizes[0] * sizes[1] * sizes[2],), float("nan"))
        reader.read("x", offsets, sizes, out)
        expected = VALUES[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
        assert torch.equal(out.view(sizes), expected)


def test_a_hole_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x was written incompletely: 20 of 120"):
        _write(tmp_path / "checkpoint", GRIDS["rows"][:1])


def test_two_names_share_bytes(tmp_path: Path) -> None:
    writer = TorchDistWriter(tmp_path)
    writer.add("x", torch.float32, (6, 4, 5))
    writer.write("x", (0, 0, 0), VALUES.clone())
    writer.alias("x", "y")
    writer.add_empty_objects(["z._extra_state/shard_0_1"])
    writer.close()
    reader = TorchDistReader(tmp_path)
    out = torch.empty(120)
    reader.read("y", (0, 0, 0), (6, 4, 5), out)
    assert torch.equal(out.view(6, 4, 5), VALUES)
    assert reader.metadata.object_keys == {"z._extra_state/shard_0_1"}


@pytest.mark.filterwarnings("ignore")
def test_reads_what_torch_saved_transposed_and_as_a_view(tmp_path: Path) -> None:
    state = {
        "plain": VALUES,
        "turned": VALUES[0].t(),
        "view": VALUES[2:4],
        "half": VALUES.half(),
        "bf16": VALUES.bfloat16(),
        "scalar": torch.tensor(3.0),
    }
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    (tmp_path / "metadata.json").write_text("{}")
    reader = TorchDistReader(tmp_path)
    for key, expected in state.items():
        out = torch.empty(expected.numel(), dtype=expected.dtype)
        reader.read(key, (0,) * expected.dim(), tuple(expected.shape), out)
        assert torch.equal(out.view(expected.shape), expected), key


def test_a_damaged_byte_is_read_or_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    _write(folder, GRIDS["whole"])
    out = torch.empty(120)
    generator = random.Random(0)
    for name, step in (("__0_0.distcp", 5), (".metadata", 10)):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole), step):
            (folder / name).write_bytes(whole[:place] + generator.randbytes(1) + whole[place + 1 :])
            try:
                reader = TorchDistReader(folder)
                for key, tensor in reader.metadata.tensors.items():
                    if tensor.shape == (6, 4, 5) and tensor.dtype == torch.float32:
                        reader.read(key, (0, 0, 0), (6, 4, 5), out)
                reader.close()
            except ValueError as error:
                assert str(folder) in str(error), place
        (folder / name).write_bytes(whole)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (__import__("os").system, ("touch /tmp/megatron_dllm_unpickled",))


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "checkpoint", GRIDS["whole"])
    marker = Path("/tmp/megatron_dllm_unpickled")
    (tmp_path / "checkpoint" / ".metadata").write_bytes(pickle.dumps(_Evil()))
    for read in (TorchDistReader, check_metadata):
        with pytest.raises(ValueError, match=r"system has no place"):
            read(tmp_path / "checkpoint")
    assert not marker.exists()


def test_metadata_cannot_change_torch_classes(tmp_path: Path) -> None:
    """BUILD on a class writes its attributes: the classes it sees are not torch's own."""
    _write(tmp_path / "checkpoint", GRIDS["whole"])
    build_on_class = b"\x80\x04ctorch.distributed.checkpoint.metadata\nTensorProperties\nN}\x8c\x04evilK\x01s\x86b."
    (tmp_path / "checkpoint" / ".metadata").write_bytes(build_on_class)
    for read in (TorchDistReader, check_metadata):
        with pytest.raises(ValueError, match="not the metadata of a torch_dist checkpoint"):
            read(tmp_path / "checkpoint")
    assert not hasattr(TensorProperties, "evil")


def test_tensor_archive_that_would_run_code_is_refused(tmp_path: Path) -> None:
    reader = _write(tmp_path / "checkpoint", GRIDS["whole"])
    reader.close()
    chunk = reader.metadata.tensors["x"].chunks[0]
    path = tmp_path / "checkpoint" / chunk.file_name
    data = path.read_bytes()
    assert data.count(b"ctorch._utils\n_rebuild_tensor_v2\n") == 1
    path.write_bytes(data.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v9\n"))
    with pytest.raises(ValueError, match="tensor x is damaged"):
        TorchDistReader(tmp_path / "checkpoint").read("x", (0, 0, 0), (6, 4, 5), torch.empty(120))


def test_metadata_that_is_no_pickle(tmp_path: Path) -> None:
    _write(tmp_path / "checkpoint", GRIDS["whole"])
    path = tmp_path / "checkpoint" / ".metadata"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        TorchDistReader(tmp_path / "checkpoint")

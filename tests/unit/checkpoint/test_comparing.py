"""Files are compared with the manifest beside the work, and the work's own error gives way to damage."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megatron_dllm.checkpoint.comparing import _in_order, compared
from megatron_dllm.checkpoint.manifest import checksum, read_manifest
from tests.unit.checkpoint.small_checkpoint import make_checkpoint


def _damage(folder: Path) -> str:
    name = next(name for name in sorted(read_manifest(folder)) if name.endswith(".distcp"))
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    return name


def test_what_is_whole_passes(tmp_path: Path) -> None:
    done = []
    with compared([make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)]):
        done.append(True)
    assert done


def test_files_of_all_folders_are_summed_up_in_step() -> None:
    a, b = Path("a"), Path("b")
    names = ["__0_10.distcp", "__0_2.distcp"]
    assert _in_order({b: names, a: names}) == [(a, names[1]), (b, names[1]), (a, names[0]), (b, names[0])]


def test_damage_is_named_after_the_block_and_before_its_own_error(tmp_path: Path) -> None:
    whole, damaged = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    name = _damage(damaged)
    done = []
    with pytest.raises(ValueError, match=f"{damaged / name} does not have the checksum"), compared([whole, damaged]):
        done.append(True)
    assert done
    with pytest.raises(ValueError, match="does not have the checksum") as refusal, compared([whole, damaged]):
        raise ValueError("tensor holds NaN")
    assert str(refusal.value.__cause__) == "tensor holds NaN"
    with pytest.raises(ValueError, match="tensor holds NaN"), compared([whole]):
        raise ValueError("tensor holds NaN")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, OSError])
def test_a_block_that_is_given_up_says_why(tmp_path: Path, kind: type[BaseException]) -> None:
    damaged = make_checkpoint(tmp_path, 1)
    _damage(damaged)
    with pytest.raises(kind), compared([damaged]):
        raise kind


def test_a_sum_that_is_stopped_reads_no_further(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    stop = threading.Event()
    assert checksum(tmp_path / "file", stop) == checksum(tmp_path / "file")
    stop.set()
    assert checksum(tmp_path / "file", stop)["size"] == 0

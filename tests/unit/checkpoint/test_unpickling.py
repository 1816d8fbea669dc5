"""Pickles that name what their format does not have."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from megatron_dllm.checkpoint.unpickling import TableUnpickler


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _find(module: str, name: str) -> Any:
    return (lambda *arguments: ("known", *arguments)) if (module, name) == ("collections", "OrderedDict") else None


def test_names_of_the_format_become_what_the_table_says() -> None:
    stream = io.BytesIO(b"ccollections\nOrderedDict\n(I5\ntR.")
    assert TableUnpickler(stream, "a test", _find).load() == ("known", 5)


def test_any_other_name_is_refused_and_not_run(tmp_path: Path) -> None:
    stream = io.BytesIO(pickle.dumps({"a": _Runs(tmp_path / "ran")}))
    with pytest.raises(pickle.UnpicklingError, match=r"mkdir has no place in a test"):
        TableUnpickler(stream, "a test", _find).load()
    assert list(tmp_path.iterdir()) == []


def test_storages_belong_only_to_formats_that_have_them() -> None:
    pickled = b"I7\nQ."
    assert TableUnpickler(io.BytesIO(pickled), "a test", _find, has_storages=True).load() == 7
    with pytest.raises(pickle.UnpicklingError, match=r"7 has no place in a test"):
        TableUnpickler(io.BytesIO(pickled), "a test", _find).load()

"""Which optional packages are there, and the wrong ones."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dllm.config import ParallelConfig
from megatron_dllm.model.paths import choose_paths
from megatron_dllm.parallel.device import DeviceFacts
from megatron_dllm.parallel.packages import Packages
from tests.reference_model import tiny_model

CUDA = DeviceFacts.as_cuda(has_transformer_engine=False)


def _refusal(packages: Packages, facts: DeviceFacts = CUDA) -> str:
    with pytest.raises(ValueError) as error:
        choose_paths(tiny_model(), ParallelConfig(precision="bf16"), replace(facts, packages=packages))
    return str(error.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), None),
        (("apex/__init__.py",), "other"),  # what PyPI's package of that name looks like
        (("apex/optimizers/__init__.py", "apex/__init__.py"), "unbuilt"),
        (("apex/optimizers/__init__.py", "apex/__init__.py", "amp_C.py"), "nvidia"),
    ],
)
def test_apex_is_known_without_importing_it(
    files: tuple[str, ...], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("raise AssertionError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert Packages.here().apex == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), ()),
        (("deep_ep/__init__.py", "deep_ep/buffer.py"), ("deepep",)),
        (("deep_ep/__init__.py", "deep_ep/hybrid_ep_buffer.py"), ("deepep", "hybridep")),
    ],
)
def test_deepeps_kernels_are_known_by_its_files(
    files: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise AssertionError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert Packages.here().deepep == expected


def test_what_megatron_would_stumble_over_is_refused() -> None:
    assert "another package than NVIDIA's" in _refusal(Packages(apex="other"))
    assert "pip uninstall apex" in _refusal(Packages(apex="unbuilt"))
    old = _refusal(Packages(transformer_engine="1.13.0+abc"), DeviceFacts.as_cuda())
    assert "transformer_engine (1.13.0+abc) must be at least 2.3.0" in old


def test_a_package_that_is_not_used_is_not_refused() -> None:
    cpu = DeviceFacts(False, False, True, Packages(transformer_engine="1.13.0"))
    assert choose_paths(tiny_model(), ParallelConfig(), cpu).optimizer.name == "torch"
    new = replace(DeviceFacts.as_cuda(), packages=Packages(transformer_engine="2.3.0"))
    assert choose_paths(tiny_model(), ParallelConfig(precision="bf16"), new).optimizer.name == "te"


def test_this_python_says_what_it_has() -> None:
    assert Packages.here().has_deepspeed == (importlib.util.find_spec("deepspeed") is not None)
    assert Packages.here(lambda name: None) == Packages()

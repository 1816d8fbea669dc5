"""Optional packages that megatron-core takes by itself where it finds them: what is there, without importing any.

A wrong one is refused here: megatron-core would fall back without a word, or fail in the middle of a start.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

# The oldest with the layers, the optimizer and the blockwise FP8 that megatron-core 0.16.1 asks for by version.
OLDEST_TRANSFORMER_ENGINE = "2.3.0"
Find = Callable[[str], ModuleSpec | None]


@dataclass(frozen=True)
class Packages:
    """What this Python has.

    Attributes:
        transformer_engine: its version; None: not installed.
        apex: nvidia; unbuilt (NVIDIA's without its CUDA kernels); other (another package of that name); None.
        has_deepspeed: DeepSpeed is installed.
        deepep: whose kernels the package deep_ep has, of deepep and hybridep.
    """

    transformer_engine: str | None = None
    apex: str | None = None
    has_deepspeed: bool = False
    deepep: tuple[str, ...] = ()

    @classmethod
    def here(cls, find: Find = importlib.util.find_spec) -> Packages:
        """Of this process's Python, as `find` finds modules."""
        has_engine = find("transformer_engine") is not None
        return cls(
            transformer_engine=_version("transformer-engine") if has_engine else None,
            apex=_apex(find),
            has_deepspeed=find("deepspeed") is not None,
            deepep=_deepep(find),
        )

    def check(self, is_cuda: bool) -> None:
        """Refuse what megatron-core would stumble over.

        Args:
            is_cuda: the device is a GPU, where TransformerEngine would be used.

        Raises:
            ValueError: another package called apex, one without kernels, or too old a TransformerEngine.
        """
        if self.apex == "other":
            raise ValueError(
                "apex (installed) is another package than NVIDIA's, as PyPI has one of that name; pip uninstall apex, "
                "and build NVIDIA's from source if you want its optimizer (docs/performance.md)."
            )
        if self.apex == "unbuilt":
            raise ValueError(
                "apex (installed) was built without its CUDA kernels (amp_C), and megatron-core would take its "
                "optimizer and fail; build it with them (docs/performance.md), or pip uninstall apex."
            )
        engine = self.transformer_engine
        if is_cuda and engine is not None and Version(engine) < Version(OLDEST_TRANSFORMER_ENGINE):
            raise ValueError(
                f"transformer_engine ({engine}) must be at least {OLDEST_TRANSFORMER_ENGINE}; "
                'pip install "megatron_dllm[gpu]", or uninstall it to run without.'
            )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # built in place: nothing says how old it is
        return OLDEST_TRANSFORMER_ENGINE


def _apex(find: Find) -> str | None:
    spec = find("apex")
    if spec is None:
        return None
    if not any((Path(place) / "optimizers").is_dir() for place in spec.submodule_search_locations or ()):
        return "other"
    return "nvidia" if find("amp_C") is not None else "unbuilt"


def _deepep(find: Find) -> tuple[str, ...]:
    spec = find("deep_ep")
    if spec is None:
        return ()
    files = {path.name for place in spec.submodule_search_locations or () for path in Path(place).glob("*.py")}
    return ("deepep", "hybridep") if "hybrid_ep_buffer.py" in files else ("deepep",)

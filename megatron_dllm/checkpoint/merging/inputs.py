"""The inputs of a merge, of either format, behind one interface; and what they must have in common."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dllm.checkpoint.folder import is_hf_folder
from megatron_dllm.checkpoint.identity import IDENTITY
from megatron_dllm.checkpoint.manifest import read_json
from megatron_dllm.checkpoint.model_tensors import model_keys
from megatron_dllm.checkpoint.stored_model import StoredModel, open_checkpoint
from megatron_dllm.checkpoint.torch_dist_read import TorchDistReader
from megatron_dllm.hf.config_meaning import BOOKKEEPING, meaning
from megatron_dllm.hf.config_values import brief
from megatron_dllm.hf.safetensors_io import SafetensorsFolder
from megatron_dllm.hf.tokenizer_folder import GENERATION_FILE, chat_template
from megatron_dllm.hf.tokenizer_meaning import tokenizer_meaning

logger = logging.getLogger(__name__)
TensorTable = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class MergeInput(ABC):
    """One model to average.

    Attributes:
        folder: where it lies.
        tensors: dtype and shape by name.
        step: optimizer steps, if known.
    """

    folder: Path
    tensors: TensorTable
    step: int | None

    @abstractmethod
    def read(self, name: str, first: int, offsets: tuple[int, ...], sizes: tuple[int, ...], out: Tensor) -> None:
        """Read a box, which is the run of elements from `first`, into `out` [prod(sizes)]."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Settings that must be equal, by name."""

    @abstractmethod
    def bookkeeping(self) -> dict[str, Any]:
        """Settings that may differ, by name: those of the last input become the mean's."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""


class TorchDistInput(MergeInput):
    """A torch_dist checkpoint of ours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored: StoredModel
        self.reader: TorchDistReader
        self.stored, self.reader = open_checkpoint(folder)
        self.step = self.stored.meta.position.step
        self.keys = model_keys(self.stored.model, self.reader)
        stored = self.reader.metadata.tensors
        self.tensors = {key: (stored[name].dtype, stored[name].shape) for key, name in self.keys.items()}

    def read(self, name: str, first: int, offsets: tuple[int, ...], sizes: tuple[int, ...], out: Tensor) -> None:
        """See `MergeInput.read`."""
        self.reader.read(self.keys[name], offsets, sizes, out)

    def description(self) -> dict[str, Any]:
        """What the tensors mean, contract and tokenizer."""
        return {
            **{f"model.{name}": getattr(self.stored.model, name) for name in IDENTITY},
            **{f"contract.{name}": value for name, value in asdict(self.stored.meta.semantics).items()},
            **(tokenizer_meaning(self.stored.tokenizer) if self.stored.tokenizer else {}),
        }

    def bookkeeping(self) -> dict[str, Any]:
        """Settings of the model that its tensors do not depend on, and the chat template."""
        model = {f"model.{name}": value for name, value in asdict(self.stored.model).items() if name not in IDENTITY}
        return model | {"chat template": chat_template(self.stored.tokenizer) if self.stored.tokenizer else None}

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


class HFInput(MergeInput):
    """A Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = None
        self.reader = SafetensorsFolder(folder)
        self.tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in self.reader.tensors.items()}
        self._path = folder / "config.json"
        self._config = _read_if_there(self._path)

    def read(self, name: str, first: int, offsets: tuple[int, ...], sizes: tuple[int, ...], out: Tensor) -> None:
        """See `MergeInput.read`."""
        self.reader.read(name, first, out)

    def description(self) -> dict[str, Any]:
        """What config.json and the tokenizer mean, however they are written."""
        return {
            **{f"config.{name}": value for name, value in meaning(self._config, str(self._path)).items()},
            **tokenizer_meaning(self.folder),
        }

    def bookkeeping(self) -> dict[str, Any]:
        """What else config.json says, how text is generated, and the chat template."""
        return {
            **{f"config.{name}": self._config.get(name) for name in BOOKKEEPING},
            GENERATION_FILE: _read_if_there(self.folder / GENERATION_FILE),
            "chat template": chat_template(self.folder),
        }

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def open_input(folder: Path, input_format: str) -> MergeInput:
    """Open a folder of either format ("torch_dist", "hf" or "auto")."""
    if not folder.is_dir():
        raise ValueError(f"checkpoints ({folder}) is no folder; name folders that exist.")
    is_hf = input_format == "hf" or (input_format == "auto" and is_hf_folder(folder))
    return HFInput(folder) if is_hf else TorchDistInput(folder)


def check_alike(inputs: list[MergeInput]) -> None:
    """Raise ValueError naming the first difference between the first input and another."""
    first = inputs[0]
    settings = first.description()
    for other in inputs[1:]:
        if type(other) is not type(first):
            raise ValueError(f"{other.folder} has another format than {first.folder}; convert one of them.")
        _check_settings(first, settings, other)
        names = sorted(set(first.tensors) ^ set(other.tensors))
        if names:
            holder, lacking = (first, other) if names[0] in first.tensors else (other, first)
            raise ValueError(
                f"tensor {names[0]} is in {holder.folder} but not in {lacking.folder} ({len(names)} names "
                "differ); only checkpoints of one model have a mean."
            )
        for name, entry in first.tensors.items():
            if not entry[0].is_floating_point:
                raise ValueError(f"tensor {name} is {_show(entry)} in {first.folder}; only floating point has a mean.")
            if other.tensors[name] != entry:
                raise ValueError(
                    f"tensor {name} is {_show(entry)} in {first.folder} and {_show(other.tensors[name])} "
                    f"in {other.folder}; only checkpoints of one model and precision have a mean."
                )


def _check_settings(first: MergeInput, ours: dict[str, Any], other: MergeInput) -> None:
    theirs = other.description()
    differing = [name for name in sorted(set(ours) | set(theirs)) if ours.get(name) != theirs.get(name)]
    if differing:
        name, *more = differing
        raise ValueError(
            f"{name} is {brief(ours.get(name))} in {first.folder} and {brief(theirs.get(name))} in {other.folder}"
            f"{f' (and {len(more)} more differ: {brief(more)})' if more else ''}; "
            "only checkpoints of one model, block grid and tokenizer have a mean."
        )


def tell_differences(inputs: list[MergeInput]) -> None:
    """Say which settings differ that may: the mean has those of the last input."""
    last = inputs[-1]
    kept = last.bookkeeping()
    for other in inputs[:-1]:
        for name, value in other.bookkeeping().items():
            if value != kept[name]:
                logger.info(
                    "%s is %s in %s and %s in %s, from which the mean takes it",
                    name,
                    brief(value),
                    other.folder,
                    brief(kept[name]),
                    last.folder,
                )


def _show(entry: tuple[torch.dtype, tuple[int, ...]]) -> str:
    return f"{str(entry[0]).removeprefix('torch.')} {list(entry[1])}"

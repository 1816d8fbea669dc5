"""More rows for the vocabulary of a torch_dist checkpoint, with or without the state of its optimizer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_dllm.checkpoint.comparing import compared
from megatron_dllm.checkpoint.manifest import write_manifest
from megatron_dllm.checkpoint.meta import Provenance, write_meta
from megatron_dllm.checkpoint.model_card import PROVENANCE
from megatron_dllm.checkpoint.model_tensors import finish_tensors, model_keys
from megatron_dllm.checkpoint.stored_model import open_checkpoint
from megatron_dllm.checkpoint.torch_dist_write import TorchDistWriter
from megatron_dllm.checkpoint.vocabulary.side import ROLES, NewVocabulary, Side, SideTensor
from megatron_dllm.hf.added_tokens import write_added_tokens
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles, tokenizer_files
from megatron_dllm.run.files import copy_files
from megatron_dllm.run.names import STATE, TOKENIZER

# In front of a state of the optimizer: optimizer.state.KIND.KEY OF THE WEIGHT.
_OPTIMIZER = "optimizer.state."
_MAIN_WEIGHTS, _MOMENTS = "param", ("exp_avg", "exp_avg_sq")


class TorchDistSide(Side):
    """A torch_dist checkpoint, with or without the state of its optimizer."""

    def __init__(self, folder: Path, keeps_optimizer: bool) -> None:
        """Open a checkpoint.

        Raises:
            ValueError: it is damaged, or has no optimizer to keep.
        """
        self.folder = folder
        self._stored, self._reader = open_checkpoint(folder)
        self._keeps_optimizer = keeps_optimizer
        self.model = self._stored.model
        self.tokenizer = TokenizerFiles(self._stored.tokenizer or folder)
        stored = self._reader.metadata.tensors
        self._keys = model_keys(self.model, self._reader)
        if keeps_optimizer:
            of_optimizer = {key: key for key in stored if key.startswith(_OPTIMIZER)}
            if not of_optimizer or not (folder / STATE).is_file():
                raise ValueError(f"optimizer (keep): {folder} holds weights alone, so there is none; leave it out.")
            self._keys |= of_optimizer
        self.tensors = {
            key: _side_tensor(key, stored[name].dtype, stored[name].shape) for key, name in self._keys.items()
        }

    def read(self, name: str, first: int, offsets: tuple[int, ...], sizes: tuple[int, ...], out: Tensor) -> None:
        """See `Side.read`."""
        self._reader.read(self._keys[name], offsets, sizes, out)

    def write(self, target: Path, vocabulary: NewVocabulary, rows: Mapping[str, Tensor]) -> None:
        """See `Side.write`."""
        self._write_beside(target, vocabulary)
        writer = TorchDistWriter(target)
        try:
            for name, tensor in self.tensors.items():
                writer.add(name, tensor.dtype, self.shape(name, vocabulary))
            with compared([self.folder]):
                self.copy(lambda name, first, offsets, sizes, data: writer.write(name, offsets, data.view(sizes)))
            for name, tensor in self.tensors.items():
                if (new := self.new_rows(name, rows)) is not None:
                    writer.write(name, (tensor.shape[0], 0), new)
            checksums = finish_tensors(writer, self.model)
        finally:
            writer.abandon()
        write_manifest(target, checksums)

    def _write_beside(self, target: Path, vocabulary: NewVocabulary) -> None:
        """The tokenizer, contract.json and, with the optimizer, where the run stood."""
        meta, has_tokenizer = self._stored.meta, self.tokenizer.exists
        if has_tokenizer:
            copy_files(tokenizer_files(self.tokenizer.folder), target / TOKENIZER)
            write_added_tokens(self.tokenizer, target / TOKENIZER, dict(vocabulary.ids))
        if (self.folder / PROVENANCE).is_file():
            shutil.copyfile(self.folder / PROVENANCE, target / PROVENANCE)
        provenance = replace(meta.provenance, tokenizer=TOKENIZER if has_tokenizer else None)
        if self._keeps_optimizer:
            shutil.copyfile(self.folder / STATE, target / STATE)
        else:
            provenance = Provenance(tokenizer=provenance.tokenizer, source=provenance.source)
            meta = replace(meta, position=replace(meta.position, is_stage_end=False))
        model = dict(meta.model) | {"vocab_size": vocabulary.size}
        write_meta(target, replace(meta, model=model, provenance=provenance))

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def _side_tensor(key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> SideTensor:
    """A tensor by its key."""
    if not key.startswith(_OPTIMIZER):
        return SideTensor(dtype, shape, ROLES.get(key))
    kind, _, weight = key.removeprefix(_OPTIMIZER).partition(".")
    role = ROLES.get(weight)
    if role is not None and kind not in (_MAIN_WEIGHTS, *_MOMENTS):
        raise ValueError(
            f"optimizer (keep): {key} is no state of Adam, so that its new rows are not known; leave the optimizer out."
        )
    return SideTensor(dtype, shape, role, is_optimizer=True, is_moment=kind in _MOMENTS)

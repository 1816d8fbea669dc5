"""More rows for the vocabulary of a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path

from torch import Tensor

from megatron_dllm.checkpoint.vocabulary.side import ROLES, NewVocabulary, Side, SideTensor
from megatron_dllm.hf.added_tokens import write_added_tokens
from megatron_dllm.hf.config_json import read_hf_config
from megatron_dllm.hf.model_folder import open_model_folder
from megatron_dllm.hf.safetensors_io import SafetensorsWriter
from megatron_dllm.hf.serving import DLLM_CONFIG
from megatron_dllm.hf.tokenizer_folder import GENERATION_FILE, TOKENIZER_FILES, TokenizerFiles
from megatron_dllm.run.files import read_json_object, refuse_dead_link, write_json

# What belongs to the model beside config.json and its weights.
_COPIED = (GENERATION_FILE, *TOKENIZER_FILES, "*.py", DLLM_CONFIG, "LICENSE*", "README.md")


class HFSide(Side):
    """A Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        """Open a folder.

        Raises:
            ValueError: its tensors are not those of its config.json.
        """
        self.folder = folder
        self.model = read_hf_config(folder).model
        self.tokenizer = TokenizerFiles(folder)
        self._opened = open_model_folder(folder, self.model)
        roles = {piece.hf_name: ROLES.get(piece.mcore_key) for piece in self._opened.names.pieces}
        self.tensors = {
            name: SideTensor(self._opened.tensors[name].dtype, shape, roles[name])
            for name, shape in self._opened.names.hf_shapes.items()
        }

    def read(self, name: str, first: int, offsets: tuple[int, ...], sizes: tuple[int, ...], out: Tensor) -> None:
        """See `Side.read`."""
        self._opened.source.read(name, first, out)

    def write(self, target: Path, vocabulary: NewVocabulary, rows: Mapping[str, Tensor]) -> None:
        """See `Side.write`."""
        config = read_json_object(self.folder / "config.json", "download it again")
        write_json(target / "config.json", config | {"vocab_size": vocabulary.size}, indent=2)
        for path in sorted({path for pattern in _COPIED for path in self.folder.glob(pattern) if not path.is_dir()}):
            refuse_dead_link(path)
            shutil.copyfile(path, target / path.name)
        write_added_tokens(self.tokenizer, target, dict(vocabulary.ids))
        tensors = {name: (tensor.dtype, self.shape(name, vocabulary)) for name, tensor in self.tensors.items()}
        writer = SafetensorsWriter(target, tensors)
        try:
            self.copy(lambda name, first, offsets, sizes, data: writer.write(name, first, data))
            for name, tensor in self.tensors.items():
                if (new := self.new_rows(name, rows)) is not None:
                    writer.write(name, prod(tensor.shape), new.flatten())
            writer.close()
        finally:
            writer.abandon()

    def close(self) -> None:
        """Close the files."""
        self._opened.source.close()

"""A torch_dist checkpoint folder of ours: contract.json, tokenizer and manifest around the tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dllm.checkpoint.identity import FORMAT
from megatron_dllm.checkpoint.manifest import check_complete, checksum, damaged_files, read_json
from megatron_dllm.checkpoint.torch_dist_read import TorchDistReader
from megatron_dllm.checkpoint.torch_dist_write import TorchDistWriter
from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.name_table import extra_state_keys, key_aliases
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import CONTRACT, MANIFEST

# Tensors of the model; everything else in a training checkpoint is the optimizer's.
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
_TYPES = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,)}
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Contract:
    """contract.json: the model, what its outputs mean, and how far it was trained."""

    model: ModelConfig
    content: dict[str, Any]

    @property
    def is_diffusion(self) -> bool:
        """Whether position i predicts token i."""
        return not self.content["contract"]["shift"]

    @property
    def block_size(self) -> int:
        """Tokens denoised together (1 for AR models)."""
        return int(self.content["contract"]["block_size"])


def read_contract(folder: Path) -> Contract:
    """Read contract.json.

    Raises:
        ValueError: it is missing, damaged, of another format, or names a field we do not know.
    """
    path = folder / CONTRACT
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format ({content.get('format')}) is not {FORMAT}; convert the checkpoint "
            "with the version that wrote it."
        )
    for part in ("model", "contract"):
        if not isinstance(content.get(part), dict):
            raise ValueError(f"{path} is damaged (no object {part}); choose another checkpoint.")
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(content["model"]) - set(fields))
    if unknown:
        raise ValueError(f"{path}: model.{unknown[0]} is not known to this version; use the version that wrote it.")
    values = {
        f"model.{name}": (content["model"].get(name, field.default), str(field.type)) for name, field in fields.items()
    }
    values |= {
        f"contract.{name}": (content["contract"].get(name), kind)
        for name, kind in (("shift", "bool"), ("block_size", "int"), ("context_length", "int"))
    }
    for name, (value, kind) in values.items():
        if type(value) not in _TYPES[kind]:
            raise ValueError(
                f"{path} is damaged: {name} ({value!r}) must be of type {kind}; choose another checkpoint."
            )
    return Contract(ModelConfig(**content["model"]), content)


def open_checkpoint(folder: Path) -> tuple[Contract, TorchDistReader]:
    """Open a checkpoint whose files are all there, with the sizes they were written with.

    Raises:
        ValueError: naming the file that is missing, truncated or altered.
    """
    contract = read_contract(folder)
    check_complete(folder)
    return contract, TorchDistReader(folder)


def model_keys(model: ModelConfig, reader: TorchDistReader) -> dict[str, str]:
    """The model's tensors in a checkpoint, without those of the optimizer.

    Returns:
        {key in the local spec: key under which it is stored}, in the order in which they are stored.
    """
    local = {alias: key for key, alias in key_aliases(model).items()}
    stored = reader.metadata.tensors
    return {
        local.get(key, key): key
        for key in stored
        if key.startswith(_MODEL_PREFIXES) and not (key in local and local[key] in stored)
    }


def finish_tensors(writer: TorchDistWriter, model: ModelConfig) -> dict[str, dict[str, Any]]:
    """After a model's tensors: their other names, megatron-core's empty extra states, and the table of contents.

    Returns:
        Size and sha256 of the files.
    """
    for key, alias in key_aliases(model).items():
        writer.alias(key, alias)
    writer.add_empty_objects(list(extra_state_keys(model)))
    return writer.close()


def new_contract(
    model: ModelConfig, *, shift: bool, block_size: int, context_length: int, has_tokenizer: bool
) -> dict[str, Any]:
    """contract.json of a checkpoint that no run of ours has trained yet."""
    return {
        "format": FORMAT,
        "model": asdict(model),
        "contract": {
            "shift": shift,
            "block_origin": "document",
            "mask_token_id": model.mask_token_id,
            "block_size": block_size,
            "context_length": context_length,
        },
        "step": 0,
        "consumed_tokens": 0,
        "stage": None,
        "is_stage_end": False,
        "tokenizer": TOKENIZER if has_tokenizer else None,
    }


def tokenizer_folder(folder: Path, contract: Contract) -> Path | None:
    """The tokenizer that a checkpoint names, if it is there."""
    name = contract.content.get("tokenizer")
    return (folder / name).resolve() if name and (folder / name).is_dir() else None


def write_json_files(folder: Path, files: dict[str, Any], checksums: dict[str, Any]) -> None:
    """Write the JSON files of a checkpoint, and last the manifest that makes it complete.

    Args:
        folder: holds the tensors.
        files: content by name.
        checksums: size and sha256 of the tensors' files.

    Raises:
        ValueError: what lies on the disk is not what was written.
    """
    for name, content in files.items():
        write_json(folder / name, content, sort_keys=True)
    manifest = dict(checksums) | {name: checksum(folder / name) for name in files}
    write_json(folder / MANIFEST, manifest, sort_keys=True)
    problems = damaged_files(folder, manifest, manifest, hash_content=False)
    if problems:
        raise ValueError(f"{problems[0]}; the disk did not keep what was written.")

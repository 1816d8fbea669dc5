"""Convert a Hugging Face folder into a torch_dist checkpoint: `python -m checkpoints_tools.hf_to_mcore`.

Streams safetensors to the checkpoint piece by piece; needs no GPU, no process group, and a few hundred
megabytes whatever the model's size. The result loads on any tensor, pipeline and expert parallel size.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_tools.command import main_guard
from megatron_dllm.checkpoint.manifest import write_manifest
from megatron_dllm.checkpoint.meta import CheckpointMeta, Provenance, Semantics, write_meta
from megatron_dllm.checkpoint.model_tensors import finish_tensors
from megatron_dllm.checkpoint.output_folder import output_folder
from megatron_dllm.checkpoint.streaming import MAX_PIECE_BYTES, Task, run, split_rows
from megatron_dllm.checkpoint.torch_dist_write import TorchDistWriter
from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.architectures import DEFAULT_BLOCK_SIZE
from megatron_dllm.hf.config_json import SourceConfig, read_hf_config
from megatron_dllm.hf.name_table import WeightMap, is_fp32, weight_map
from megatron_dllm.hf.safetensors_io import SafetensorsFolder
from megatron_dllm.hf.special_tokens import settle_special_tokens
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles, copy_tokenizer
from megatron_dllm.run.names import TOKENIZER

logger = logging.getLogger(__name__)


def convert(hf: Path, output: Path, mask_token_id: int | None = None, tokenizer: Path | None = None) -> None:
    """Convert one folder.

    Args:
        hf: folder with config.json and safetensors.
        output: checkpoint folder to make; must not exist.
        mask_token_id: None: from config.json, the reserved id of a known vocabulary, or the tokenizer.
        tokenizer: folder to take the tokenizer from; None: `hf`.

    Raises:
        ValueError: anything wrong with the input, naming file and tensor; nothing is left behind.
    """
    source = read_hf_config(hf)
    files = TokenizerFiles(tokenizer or hf)
    if not files.exists:
        logger.warning("%s has no tokenizer files; the checkpoint will have none either", files.folder)
    model = settle_special_tokens(source.model, files, mask_token_id)
    folder = SafetensorsFolder(hf)
    has_stacked_experts = any(name.endswith(".mlp.experts.gate_proj") for name in folder.tensors)
    names = weight_map(model, has_stacked_experts=has_stacked_experts)
    dtypes = _check_tensors(folder, names, model)
    total_bytes = sum(tensor.num_bytes for name, tensor in folder.tensors.items() if name in names.hf_shapes)
    with output_folder(output, total_bytes) as temporary:
        writer = TorchDistWriter(temporary)
        try:
            for key, shape in names.mcore_shapes.items():
                writer.add(key, dtypes[key], shape)
            run(_tasks(folder, names, writer), total_bytes, "hf_to_mcore")
            checksums = finish_tensors(writer, model)
        finally:
            writer.abandon()
            folder.close()
        if files.exists:
            (temporary / TOKENIZER).mkdir()
            copy_tokenizer(files, temporary / TOKENIZER, model.mask_token_id, model.vocab_size)
        write_meta(temporary, _meta(model, source, hf, files.exists))
        write_manifest(temporary, checksums)


def _check_tensors(folder: SafetensorsFolder, names: WeightMap, model: ModelConfig) -> dict[str, torch.dtype]:
    """Compare the folder's tensors with the model's; returns the dtype of every megatron tensor."""
    expected = names.hf_shapes
    missing = [name for name in expected if name not in folder.tensors]
    if missing:
        raise ValueError(
            f"{folder.folder}: tensor {missing[0]} and {len(missing) - 1} more are missing (found "
            f"{len(folder.tensors)} of {len(expected)}); the folder is incomplete or config.json is "
            "another model's."
        )
    extra = [name for name in folder.tensors if name not in expected]
    if extra:
        tensor = folder.tensors[extra[0]]
        remedy = (
            "it is tied to the embedding: set tie_word_embeddings to false or remove it"
            if extra[0] == "lm_head.weight"
            else "our model has no place for it, so it would be lost"
        )
        raise ValueError(
            f"{tensor.path}: tensor {extra[0]} ({list(tensor.shape)}) and {len(extra) - 1} more are not "
            f"part of a {model.family} with this config.json; {remedy}."
        )
    dtypes: dict[str, torch.dtype] = {}
    for name, shape in expected.items():
        tensor = folder.tensors[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(shape)}; one of the two belongs to another model."
            )
        if is_fp32(name) and tensor.dtype != torch.float32:
            logger.warning(
                "%s: %s is stored as %s; what was lost by rounding it is lost", tensor.path, name, tensor.dtype
            )
    for piece in names.pieces:
        stored = folder.tensors[piece.hf_name].dtype
        if not stored.is_floating_point:
            raise ValueError(
                f"{folder.tensors[piece.hf_name].path}: tensor {piece.hf_name} has dtype {stored}; "
                "weights must be floating point: dequantize the checkpoint first."
            )
        dtype = torch.float32 if is_fp32(piece.hf_name) else stored
        if dtypes.setdefault(piece.mcore_key, dtype) != dtype:
            raise ValueError(
                f"{folder.tensors[piece.hf_name].path}: tensor {piece.hf_name} has dtype {stored}, "
                f"others of {piece.mcore_key} have {dtypes[piece.mcore_key]}; store them alike."
            )
    return dtypes


def _tasks(folder: SafetensorsFolder, names: WeightMap, writer: TorchDistWriter) -> Iterator[Task]:
    for piece in names.pieces:
        dtype = folder.tensors[piece.hf_name].dtype
        for first, offsets, sizes in split_rows(piece.offsets, piece.sizes, MAX_PIECE_BYTES // dtype.itemsize):
            yield Task(
                f"{folder.tensors[piece.hf_name].path}: {piece.hf_name}",
                prod(sizes),
                dtype,
                partial(folder.read, piece.hf_name, piece.hf_start + first),
                partial(_write, writer, piece.mcore_key, offsets, sizes),
            )


def _write(writer: TorchDistWriter, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], data: Tensor) -> None:
    box = data.view(sizes)
    writer.write(key, offsets, box.float() if is_fp32(key) else box)


def _meta(model: ModelConfig, source: SourceConfig, hf: Path, has_tokenizer: bool) -> CheckpointMeta:
    semantics = Semantics(
        shift=not source.is_diffusion,
        block_origin="document",
        mask_token_id=model.mask_token_id,
        block_size=(source.block_size or DEFAULT_BLOCK_SIZE) if source.is_diffusion else 1,
        context_length=model.max_position_embeddings,
    )
    provenance = Provenance(tokenizer=TOKENIZER if has_tokenizer else None, source=str(hf.absolute()))
    return CheckpointMeta(asdict(model), semantics, provenance=provenance)


def _mask_token_id(text: str) -> int | None:
    return None if text == "auto" else int(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder (config.json, *.safetensors)")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to make; must not exist")
    parser.add_argument("--mask_token_id", type=_mask_token_id, help="id of the mask token, or auto (default)")
    parser.add_argument("--tokenizer", type=Path, help="take the tokenizer from this folder instead")
    arguments = parser.parse_args()
    with main_guard(parser):
        convert(arguments.hf, arguments.output, arguments.mask_token_id, arguments.tokenizer)


if __name__ == "__main__":
    main()

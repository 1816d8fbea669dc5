"""Convert a Hugging Face folder into a torch_dist checkpoint: `python -m checkpoints_tools.hf_to_mcore`.

Streams safetensors to the checkpoint piece by piece; needs no GPU, no process group, and a few hundred
megabytes whatever the model's size. The result loads on any tensor, pipeline and expert parallel size.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import logging
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_tools.command import prepare_tool
from megatron_dllm.checkpoint.manifest import write_manifest
from megatron_dllm.checkpoint.meta import CheckpointMeta, Provenance, Semantics, write_meta
from megatron_dllm.checkpoint.model_tensors import finish_tensors
from megatron_dllm.checkpoint.output_folder import output_folder
from megatron_dllm.checkpoint.stored_model import read_stored_model
from megatron_dllm.checkpoint.streaming import MAX_PIECE_BYTES, Task, run, split_rows
from megatron_dllm.checkpoint.torch_dist_write import TorchDistWriter
from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.config_json import SourceConfig, read_hf_config
from megatron_dllm.hf.model_folder import ModelFolder, open_model_folder
from megatron_dllm.hf.name_table import is_fp32
from megatron_dllm.hf.special_tokens import settle_special_tokens
from megatron_dllm.hf.tokenizer_folder import copy_tokenizer, named_tokenizer
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
    files = named_tokenizer(tokenizer, hf)
    if not files.exists:
        logger.warning("%s has no tokenizer files; the checkpoint will have none either", files.folder)
    model = settle_special_tokens(source.model, files, mask_token_id)
    folder = open_model_folder(hf, model)
    dtypes = _dtypes(folder)
    _tell_dtype(hf, source, folder)
    with output_folder(output, folder.num_bytes) as temporary:
        # Whatever may be refused comes before the weights, which take hours.
        if files.exists:
            (temporary / TOKENIZER).mkdir()
            copy_tokenizer(files, temporary / TOKENIZER, model.mask_token_id, model.vocab_size)
        write_meta(temporary, _meta(model, source, hf, files.exists))
        writer = TorchDistWriter(temporary)
        try:
            for key, shape in folder.names.mcore_shapes.items():
                writer.add(key, dtypes[key], shape)
            run(_tasks(folder, writer), folder.num_bytes, "hf_to_mcore")
            checksums = finish_tensors(writer, model)
        finally:
            writer.abandon()
            folder.source.close()
        write_manifest(temporary, checksums)


def _dtypes(folder: ModelFolder) -> dict[str, torch.dtype]:
    """The dtype of every megatron tensor: that of its parts, which must have one; expert_bias is fp32."""
    dtypes: dict[str, torch.dtype] = {}
    for piece in folder.names.pieces:
        tensor = folder.tensors[piece.hf_name]
        if is_fp32(piece.hf_name) and tensor.dtype != torch.float32:
            logger.warning(
                "%s: %s is stored as %s; what was lost by rounding it is lost", tensor.path, piece.hf_name, tensor.dtype
            )
        dtype = torch.float32 if is_fp32(piece.hf_name) else tensor.dtype
        if dtypes.setdefault(piece.mcore_key, dtype) != dtype:
            raise ValueError(
                f"{tensor.path}: tensor {piece.hf_name} has dtype {tensor.dtype}, "
                f"others of {piece.mcore_key} have {dtypes[piece.mcore_key]}; store them alike."
            )
    return dtypes


def _tell_dtype(hf: Path, source: SourceConfig, folder: ModelFolder) -> None:
    """Weights stay as they are stored; say so where config.json speaks of another dtype."""
    kinds = {str(tensor.dtype).removeprefix("torch.") for name, tensor in folder.tensors.items() if not is_fp32(name)}
    if source.dtype is not None and kinds != {source.dtype}:
        path, names = hf / "config.json", " and ".join(sorted(kinds))
        logger.warning("%s: dtype (%s) differs from that of the tensors (%s), which is kept", path, source.dtype, names)


def _tasks(folder: ModelFolder, writer: TorchDistWriter) -> Iterator[Task]:
    for piece in folder.names.pieces:
        tensor = folder.tensors[piece.hf_name]
        for first, offsets, sizes in split_rows(piece.offsets, piece.sizes, MAX_PIECE_BYTES // tensor.dtype.itemsize):
            yield Task(
                f"{tensor.path}: {piece.hf_name}",
                prod(sizes),
                tensor.dtype,
                partial(folder.source.read, piece.hf_name, piece.hf_start + first),
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
        block_size=source.decoded_block_size,
        context_length=source.context_length or model.max_position_embeddings,
    )
    provenance = Provenance(tokenizer=TOKENIZER if has_tokenizer else None, source=str(hf.absolute()))
    return CheckpointMeta(asdict(model), semantics, provenance=provenance)


def next_commands(output: Path) -> list[str]:
    """What follows the conversion of an autoregressive model, as a shell takes it; nothing for another model."""
    stored = read_stored_model(output)
    if stored.meta.is_diffusion:
        return []
    tokenizer = shlex.quote(str(output / TOKENIZER if stored.tokenizer else "TOKENIZER"))
    load = shlex.quote(f"checkpoint.load={output}")
    return [
        f"python -m megatron_dllm.data.tokenize --input TEXT --tokenizer {tokenizer} --output CORPUS",
        f"torchrun --nproc_per_node NUM_GPUS -m megatron_dllm.train experiment=convert {load} data.train=CORPUS",
    ]


def _mask_token_id(text: str) -> int | None:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"({text}) must be the id of a token, or auto")
    return None if text == "auto" else int(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder (config.json, *.safetensors)")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to make; must not exist")
    parser.add_argument("--mask_token_id", type=_mask_token_id, help="id of the mask token, or auto (default)")
    parser.add_argument("--tokenizer", type=Path, help="take the tokenizer from this folder instead")
    arguments = parser.parse_args()
    prepare_tool()
    convert(arguments.hf, arguments.output, arguments.mask_token_id, arguments.tokenizer)
    commands = next_commands(arguments.output)
    if commands:
        print("next, with your text:", *commands, sep="\n    ")


if __name__ == "__main__":
    run_command(main)

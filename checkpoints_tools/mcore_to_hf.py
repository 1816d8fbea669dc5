"""Convert a torch_dist checkpoint into a Hugging Face folder: `python -m checkpoints_tools.mcore_to_hf`.

Reads the checkpoint of any layout, a run's or a converter's, and writes a folder that is complete in
itself: safetensors shards, config.json as serving engines read it, tokenizer, the modeling code where
transformers has none of its own, and a README that says where the weights come from.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_tools.command import prepare_tool
from megatron_dllm.checkpoint.comparing import compared
from megatron_dllm.checkpoint.folder import resolve_checkpoint
from megatron_dllm.checkpoint.model_card import model_card
from megatron_dllm.checkpoint.model_tensors import model_keys
from megatron_dllm.checkpoint.output_folder import output_folder
from megatron_dllm.checkpoint.stored_model import StoredModel, open_checkpoint
from megatron_dllm.checkpoint.streaming import MAX_PIECE_BYTES, Task, run, split_rows
from megatron_dllm.checkpoint.torch_dist_read import TorchDistReader
from megatron_dllm.config import ModelConfig
from megatron_dllm.data.chat_template import ChatTemplate
from megatron_dllm.hf.architectures import (
    ARCHITECTURE_CLASS,
    ARCHITECTURES_OF_FAMILY,
    CODE_OF_ARCHITECTURE,
    DIFFUSION_ARCHITECTURES,
    MODELING_FILES,
)
from megatron_dllm.hf.export_config import to_hf_config
from megatron_dllm.hf.export_limits import as_exported, check_architecture
from megatron_dllm.hf.name_table import WeightMap, is_fp32, weight_map
from megatron_dllm.hf.safetensors_io import MAX_SHARD_BYTES, SafetensorsWriter
from megatron_dllm.hf.serving import DLLM_CONFIG, SGLANG, dllm_config, sglang_differences
from megatron_dllm.hf.tokenizer_folder import (
    TokenizerFiles,
    chat_template,
    copy_tokenizer,
    name_tokenizer_class,
    named_tokenizer,
)
from megatron_dllm.run.files import write_json, write_text

logger = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def convert(
    checkpoint: Path,
    output: Path,
    architecture: str | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Convert one checkpoint.

    Args:
        checkpoint: a step folder, or a run folder (its latest checkpoint).
        output: folder to make; must not exist.
        architecture: None: the diffusion architecture of the family for a diffusion model, else the family itself.
        dtype: "bf16" or "fp32"; None: as stored. expert_bias is fp32 in any case.
        tokenizer: folder to take the tokenizer from; None: the one the checkpoint names.
        max_shard_bytes: of the safetensors files.

    Raises:
        ValueError: anything wrong with the input, naming file and tensor; nothing is left behind.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    stored_model, reader = open_checkpoint(checkpoint)
    model, semantics = stored_model.model, stored_model.meta.semantics
    architecture = settle_architecture(stored_model, architecture)
    exported = as_exported(model, architecture)
    names = weight_map(model, architecture)
    keys = _check_keys(reader, names, model)
    stored = {key: reader.metadata.tensors[keys[key]].dtype for key in names.mcore_shapes}
    wanted = DTYPES[dtype] if dtype else None
    tensors = {
        piece.hf_name: (
            torch.float32 if is_fp32(piece.hf_name) else wanted or stored[piece.mcore_key],
            names.hf_shapes[piece.hf_name],
        )
        for piece in names.pieces
    }
    dtype_name = str(next(iter(tensors.values()))[0]).removeprefix("torch.")
    zeros = {
        name: (torch.float32, shape)
        for name, shape in weight_map(exported, architecture).hf_shapes.items()
        if name not in tensors
    }
    config = to_hf_config(exported, architecture, dtype_name, semantics.block_size, semantics.context_length)
    files = named_tokenizer(tokenizer, stored_model.tokenizer or checkpoint)
    if not files.exists:
        logger.warning("%s names no tokenizer; give --tokenizer for a folder that serves by itself", checkpoint)
    num_bytes = sum(prod(shape) * kind.itemsize for kind, shape in (tensors | zeros).values())
    with output_folder(output, num_bytes) as temporary:
        # Whatever may be refused comes before the weights, which take hours.
        write_json(temporary / "config.json", config, indent=2)
        write_json(
            temporary / "generation_config.json",
            {"eos_token_id": _stop_ids(files, model, architecture), "pad_token_id": model.pad_token_id},
            indent=2,
        )
        copy_tokenizer(files, temporary, model.mask_token_id, model.vocab_size)
        name_tokenizer_class(temporary)
        for name in CODE_OF_ARCHITECTURE.get(architecture, ()):
            shutil.copyfile(MODELING_FILES / name, temporary / name)
        if architecture in SGLANG:
            write_text(temporary / DLLM_CONFIG, dllm_config(semantics.block_size))
        write_text(temporary / "README.md", model_card(stored_model, architecture, dtype_name, temporary))
        writer = SafetensorsWriter(temporary, tensors | zeros, max_shard_bytes)
        try:
            read_bytes = sum(prod(shape) * stored[key].itemsize for key, shape in names.mcore_shapes.items())
            with compared([checkpoint]):
                run(_tasks(reader, names, keys, stored, tensors, writer), read_bytes, "mcore_to_hf")
            for name, (kind, shape) in zeros.items():
                writer.write(name, 0, torch.zeros(prod(shape), dtype=kind))
            writer.close()
        finally:
            writer.abandon()
            reader.close()


def _stop_ids(files: TokenizerFiles, model: ModelConfig, architecture: str) -> int | list[int]:
    """Tokens at which an engine stops: the end of a document, and of a turn where a diffusion model answers chats."""
    if architecture not in CODE_OF_ARCHITECTURE or chat_template(files.folder) is None:
        return model.eos_token_id
    try:
        turn = ChatTemplate.load(str(files.folder)).end_of_turn()
    except ValueError as error:
        logger.warning("an engine will not stop at the end of a turn: %s", error)
        return model.eos_token_id
    return model.eos_token_id if turn == model.eos_token_id else [turn, model.eos_token_id]


def settle_architecture(stored: StoredModel, asked: str | None) -> str:
    """The architecture to write, None asked: the one of the family that means what the checkpoint means.

    Raises:
        ValueError: an autoregressive class for a model that predicts no next token, or one that cannot hold it.
    """
    model, is_diffusion = stored.model, stored.meta.is_diffusion
    choices = ARCHITECTURES_OF_FAMILY[model.family]
    own = next(choice for choice in choices if (choice in DIFFUSION_ARCHITECTURES) == is_diffusion)
    architecture = asked or own
    check_architecture(model, architecture)
    semantics = stored.meta.semantics
    if is_diffusion and semantics.shift:
        classes = ", ".join(ARCHITECTURE_CLASS[choice] for choice in choices)
        raise ValueError(
            f"{stored.folder}: contract.shift (true) with blocks of {semantics.block_size} predicts a token at the "
            f"slot before it, and no class that is exported does ({classes}); "
            "decode it with megatron_dllm.generate, or train it without a shift."
        )
    if is_diffusion and architecture not in DIFFUSION_ARCHITECTURES:
        raise ValueError(
            f"architecture ({architecture}) predicts the next token, {stored.folder} the token of the same place: "
            f"served as {ARCHITECTURE_CLASS[architecture]} it would answer with noise; use {own}."
        )
    if is_diffusion:
        _check_clean_blocks(stored)
    if architecture in DIFFUSION_ARCHITECTURES and not is_diffusion:
        logger.warning(
            "%s predicts the next token (shift), %s serves diffusion models: train it before you serve it",
            stored.folder,
            architecture,
        )
    elif architecture in SGLANG:
        for difference in sglang_differences(architecture, stored.meta.semantics.block_size, model.mask_token_id):
            logger.warning("%s", difference)
    return architecture


def _check_clean_blocks(stored: StoredModel) -> None:
    """Refuse a model whose clean tokens see less than those that the exported classes keep."""
    semantics = stored.meta.semantics
    if semantics.clean_grid < semantics.block_size:
        raise ValueError(
            f"clean_block_size ({semantics.clean_grid}) of {stored.folder} must be its block_size "
            f"({semantics.block_size}): the exported classes keep finished blocks whose tokens all see each other, "
            "which this model has never read; train a last stage without clean_block_size."
        )


def _check_keys(reader: TorchDistReader, names: WeightMap, model: ModelConfig) -> dict[str, str]:
    """Compare the checkpoint's tensors with the model's; returns the key under which each is stored."""
    found = reader.metadata.tensors
    keys = model_keys(model, reader)
    missing = [key for key in names.mcore_shapes if key not in keys]
    if missing:
        raise ValueError(
            f"{reader.folder}: tensor {missing[0]} and {len(missing) - 1} more are missing (found "
            f"{len(keys)} of {len(names.mcore_shapes)}); the checkpoint is not one of the model in its "
            "contract.json."
        )
    extra = [key for key in keys if key not in names.mcore_shapes]
    if extra:
        raise ValueError(
            f"{reader.folder}: tensor {extra[0]} and {len(extra) - 1} more have no place in a "
            f"{model.family} with this contract.json; they would be lost."
        )
    for key, shape in names.mcore_shapes.items():
        if found[keys[key]].shape != shape:
            raise ValueError(
                f"{reader.folder}: tensor {keys[key]} has shape {list(found[keys[key]].shape)}, "
                f"contract.json asks for {list(shape)}; one of the two belongs to another model."
            )
        if not found[keys[key]].dtype.is_floating_point:
            raise ValueError(
                f"{reader.folder}: tensor {keys[key]} has dtype {found[keys[key]].dtype}, weights are floating point; "
                "the checkpoint is damaged: choose another one."
            )
    return keys


def _tasks(
    reader: TorchDistReader,
    names: WeightMap,
    keys: dict[str, str],
    stored: dict[str, torch.dtype],
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    writer: SafetensorsWriter,
) -> Iterator[Task]:
    for piece in names.pieces:
        key, dtype = keys[piece.mcore_key], stored[piece.mcore_key]
        target = tensors[piece.hf_name][0]
        for first, offsets, sizes in split_rows(piece.offsets, piece.sizes, MAX_PIECE_BYTES // dtype.itemsize):
            yield Task(
                f"{reader.folder}: {key}",
                prod(sizes),
                dtype,
                partial(reader.read, key, offsets, sizes),
                partial(_write, writer, piece.hf_name, piece.hf_start + first, target),
            )


def _write(writer: SafetensorsWriter, name: str, start: int, dtype: torch.dtype, data: Tensor) -> None:
    writer.write(name, start, data.to(dtype))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="step folder, or run folder (its latest)")
    parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument(
        "--architecture", choices=sorted(ARCHITECTURES_OF_FAMILY), help="default: by family and contract"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as stored")
    parser.add_argument("--tokenizer", type=Path, help="take the tokenizer from this folder instead")
    arguments = parser.parse_args()
    prepare_tool()
    convert(arguments.checkpoint, arguments.output, arguments.architecture, arguments.dtype, arguments.tokenizer)


if __name__ == "__main__":
    run_command(main)

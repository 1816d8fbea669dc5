"""What a folder of weights says of its model: a torch_dist checkpoint of a run or a tool, or one of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dllm.checkpoint.folder import is_hf_folder, resolve_checkpoint
from megatron_dllm.checkpoint.stored_model import read_stored_model
from megatron_dllm.checkpoint.typed import read_fields
from megatron_dllm.config import ModelConfig, SftConfig
from megatron_dllm.hf.config_json import read_hf_config
from megatron_dllm.hf.special_tokens import settle_special_tokens
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles
from megatron_dllm.run.names import CONTRACT


@dataclass(frozen=True)
class WeightsFolder:
    """A model on disk, without its tensors.

    Attributes:
        folder: of the weights.
        is_hf: whether they are those of a Hugging Face folder.
        model: sizes and special tokens; an autoregressive HF folder may leave token ids open (-1).
        is_diffusion: it denoises blocks; else it is autoregressive.
        shift: position i predicts token i + 1; else token i.
        block_size: tokens denoised together; 1 for autoregressive models.
        context_length: of training; None where the folder does not say.
        block_origin: where blocks begin to count; None where the folder does not say.
        precision: of the run that wrote it, if a run did.
        tokenizer: folder of the tokenizer, if there is one.
        clean_block_size: clean tokens that see each other, as it was trained; None: block_size.
        sft: how it was trained on chats; None where it was not, or the folder does not say.
    """

    folder: Path
    is_hf: bool
    model: ModelConfig
    is_diffusion: bool
    shift: bool
    block_size: int
    context_length: int | None
    block_origin: str | None
    precision: str | None
    tokenizer: Path | None
    clean_block_size: int | None = None
    sft: SftConfig | None = None


def read_weights_folder(path: Path) -> WeightsFolder:
    """Find out what lies in a folder: of HF, of a run, its checkpoints folder, or one torch_dist checkpoint.

    Raises:
        ValueError: nothing that can be read as a model does.
    """
    if is_hf_folder(path):
        return _read_hf(path)
    stored = read_stored_model(resolve_checkpoint(path))
    semantics = stored.meta.semantics
    return WeightsFolder(
        folder=stored.folder,
        is_hf=False,
        model=stored.model,
        is_diffusion=stored.meta.is_diffusion,
        shift=semantics.shift,
        block_size=semantics.block_size,
        context_length=semantics.context_length,
        block_origin=semantics.block_origin,
        precision=stored.meta.provenance.precision,
        tokenizer=stored.tokenizer,
        clean_block_size=semantics.clean_block_size,
        sft=None if stored.meta.sft is None else read_fields(SftConfig, stored.meta.sft, f"{path / CONTRACT}: sft."),
    )


def _read_hf(folder: Path) -> WeightsFolder:
    stored = read_hf_config(folder)
    files = TokenizerFiles(folder)
    model = settle_special_tokens(stored.model, files) if stored.is_diffusion else stored.model
    return WeightsFolder(
        folder=folder,
        is_hf=True,
        model=model,
        is_diffusion=stored.is_diffusion,
        shift=not stored.is_diffusion,
        block_size=stored.decoded_block_size,
        context_length=stored.context_length,
        block_origin=None,
        precision=None,
        tokenizer=folder if files.exists else None,
    )

"""What a checkpoint folder says about decoding it, read before anything large is: sizes, block size, tokenizer.

Two kinds of folder: one of Hugging Face, and a torch_dist checkpoint of a run or of a converter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dllm.checkpoint.folder import resolve_checkpoint
from megatron_dllm.checkpoint.stored_model import read_stored_model
from megatron_dllm.config import GenerateConfig, ModelConfig
from megatron_dllm.diffusion.decode import DecodingContract
from megatron_dllm.hf.config_json import read_hf_config
from megatron_dllm.hf.special_tokens import settle_special_tokens
from megatron_dllm.hf.tokenizer_folder import TOKENIZER_FILE, TokenizerFiles

HF_CONFIG = "config.json"
# Block sizes at which serving engines decode an architecture whose config.json names none.
SERVED_BLOCK_SIZES = {"llada2_moe": 32, "sdar_moe": 4, "sdar": 4}


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint that can be decoded.

    Attributes:
        folder: of the weights.
        is_hf: whether they are those of a Hugging Face folder.
        model: sizes and special tokens.
        contract: how to decode, the user's block_size and context_length in place.
        tokenizer: folder of the tokenizer.
    """

    folder: Path
    is_hf: bool
    model: ModelConfig
    contract: DecodingContract
    tokenizer: Path


def read_source(config: GenerateConfig) -> CheckpointSource:
    """Find out what `config.checkpoint` is.

    Raises:
        ValueError: it is no checkpoint, one that predicts the next token, or one without a tokenizer.
    """
    path = Path(config.checkpoint)
    if not path.is_dir():
        raise ValueError(f"checkpoint ({path}) is not a folder; give an HF folder, a run folder or a step_* folder.")
    is_hf = (path / HF_CONFIG).is_file()
    folder = path if is_hf else resolve_checkpoint(path)
    model, block_size, beside = _read_hf(folder) if is_hf else _read_torch_dist(folder)
    longest = model.max_position_embeddings
    if config.context_length is not None and config.context_length > longest:
        raise ValueError(
            f"context_length ({config.context_length}) must not exceed the model's max_position_embeddings ({longest})."
        )
    contract = DecodingContract(
        block_size=config.block_size or block_size,
        context_length=config.context_length or longest,
        mask_token_id=model.mask_token_id,
        eos_token_ids=(model.eos_token_id,),
    )
    return CheckpointSource(folder, is_hf, model, contract, _find_tokenizer(beside, config.tokenizer))


def _read_torch_dist(folder: Path) -> tuple[ModelConfig, int, Path | None]:
    """Model, block size and tokenizer folder of a torch_dist checkpoint."""
    stored = read_stored_model(folder)
    if not stored.meta.is_diffusion:
        raise ValueError(
            f"{folder}: contract.shift (true) means that it predicts the next token, autoregressively; "
            "convert it with megatron_dllm.train before decoding blocks."
        )
    return stored.model, stored.meta.semantics.block_size, stored.tokenizer


def _read_hf(folder: Path) -> tuple[ModelConfig, int, Path | None]:
    """Model, block size and tokenizer folder of an HF folder."""
    stored = read_hf_config(folder)
    model = stored.model
    if not stored.is_diffusion:
        raise ValueError(
            f"{folder}: model_type ({model.family}) predicts the next token, autoregressively; convert it "
            f"first, or name a folder of {' or '.join(SERVED_BLOCK_SIZES)}."
        )
    model = settle_special_tokens(model, TokenizerFiles(folder))
    return model, stored.block_size or SERVED_BLOCK_SIZES[model.family], folder


def _find_tokenizer(beside: Path | None, asked: str | None) -> Path:
    """The tokenizer folder that was asked for, or else the one that belongs to the weights."""
    folder = Path(asked) if asked is not None else beside
    if folder is None:
        raise ValueError("tokenizer (null) must name a folder: there is none beside the checkpoint.")
    if not (folder / TOKENIZER_FILE).is_file():
        raise ValueError(f"tokenizer ({folder}) has no {TOKENIZER_FILE}; name a folder that has one.")
    return folder

"""What a checkpoint folder says about decoding it, read before anything large is: sizes, block size, tokenizer.

Two kinds of folder: one of Hugging Face, and a torch_dist checkpoint of a run or of a converter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dllm.checkpoint.weights_folder import WeightsFolder, read_weights_folder
from megatron_dllm.config import GenerateConfig, ModelConfig
from megatron_dllm.diffusion.decode import DecodingContract
from megatron_dllm.hf.architectures import DIFFUSION_ARCHITECTURES
from megatron_dllm.hf.tokenizer_folder import TOKENIZER_FILE


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
        ValueError: it is no checkpoint, an autoregressive one of Hugging Face or that is to fill blocks, or one without
            a tokenizer.
    """
    path = Path(config.checkpoint)
    if not path.is_dir():
        raise ValueError(f"checkpoint ({path}) is not a folder; give an HF folder, a run folder or a step_* folder.")
    weights = read_weights_folder(path)
    if not weights.is_diffusion and (weights.is_hf or config.block_size not in (None, 1)):
        raise ValueError(_autoregressive(weights, config.block_size))
    model = weights.model.stretched(config.rotary_scaling)
    longest = model.max_position_embeddings
    if config.context_length is not None and config.context_length > longest:
        raise ValueError(
            f"context_length ({config.context_length}) must not exceed the model's max_position_embeddings "
            f"({longest}); a rotary_scaling reaches further."
        )
    contract = DecodingContract(
        block_size=config.block_size or weights.block_size,
        context_length=config.context_length or longest,
        mask_token_id=model.mask_token_id,
        eos_token_ids=(model.eos_token_id,),
        shift=weights.shift,
        clean_block_size=weights.clean_block_size,
    )
    contract.validate()
    tokenizer = _find_tokenizer(weights.tokenizer, config.tokenizer)
    return CheckpointSource(weights.folder, weights.is_hf, model, contract, tokenizer)


def _autoregressive(weights: WeightsFolder, block_size: int | None) -> str:
    """Why such weights are not decoded in blocks of this size, and what to do."""
    if weights.is_hf:
        return (
            f"{weights.folder}: model_type ({weights.model.family}) predicts the next token, autoregressively; "
            f"convert it first, or name a folder of {' or '.join(DIFFUSION_ARCHITECTURES)}."
        )
    return (
        f"{weights.folder}: contract.shift (true) with blocks of 1 token predicts the next token, autoregressively, "
        f"and block_size ({block_size}) asks for more; leave block_size out to decode from left to right, or convert "
        "it with megatron_dllm.train before decoding blocks."
    )


def _find_tokenizer(beside: Path | None, asked: str | None) -> Path:
    """The tokenizer folder that was asked for, or else the one that belongs to the weights."""
    folder = Path(asked) if asked is not None else beside
    if folder is None:
        raise ValueError("tokenizer (null) must name a folder: there is none beside the checkpoint.")
    if not (folder / TOKENIZER_FILE).is_file():
        raise ValueError(f"tokenizer ({folder}) has no {TOKENIZER_FILE}; name a folder that has one.")
    return folder

"""The ids of the tokens that end, pad and mask, decided where a Hugging Face model enters the pipeline.

Serving engines take the mask token's id as given (SGLang: 156895 for LLaDA2), so it is settled on the way in, not on
the way out.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.encoding_fingerprint import PLACEHOLDER
from megatron_dllm.hf.tokenizer_folder import RESERVED_MASK_IDS, TokenizerFiles

logger = logging.getLogger(__name__)


def settle_special_tokens(model: ModelConfig, files: TokenizerFiles, mask_token_id: int | None = None) -> ModelConfig:
    """Fill in what config.json does not say about special tokens.

    Args:
        model: from config.json; an id it does not state is negative.
        files: the tokenizer.
        mask_token_id: what the user asks for, or None.

    Returns:
        The model, checked.

    Raises:
        ValueError: an id that neither file states, or a mask token that cannot be right.
    """
    if files.vocab_size > model.vocab_size:
        raise ValueError(
            f"{files.folder}: the tokenizer has {files.vocab_size} tokens, the model's embedding {model.vocab_size} "
            "rows (vocab_size); give --tokenizer with the model's own."
        )
    own = files.eos_id()
    eos = model.eos_token_id if model.eos_token_id >= 0 else own
    pad = model.pad_token_id if model.pad_token_id >= 0 else files.special_id("pad_token")
    if eos is None:
        eos = pad  # LLaDA2 states its end-of-text token as pad_token_id alone.
    if eos is None:
        raise ValueError(
            f"eos_token_id is neither in config.json nor in the tokenizer of {files.folder}; add it to either."
        )
    _warn_of_other_ends(files, eos, own)
    mask = settle_mask_id(files, model.vocab_size, model.mask_token_id, mask_token_id)
    model = replace(model, eos_token_id=eos, pad_token_id=eos if pad is None else pad, mask_token_id=mask)
    model.validate()
    return model


def _warn_of_other_ends(files: TokenizerFiles, eos: int, own: int | None) -> None:
    if own is not None and own != eos:
        logger.warning(
            "eos_token_id (%d) differs from the tokenizer's eos_token (%d, %s): text that %s tokenizes ends in another "
            "token than the model's; correct config.json or tokenizer_config.json",
            eos,
            own,
            files.texts.get(own),
            files.folder,
        )
    elif files.stop_ids() and eos not in files.stop_ids():
        logger.warning(
            "eos_token_id (%d) is none of those at which %s stops (%s); documents end in the former",
            eos,
            files.folder / "generation_config.json",
            files.stop_ids(),
        )


def settle_mask_id(files: TokenizerFiles, vocab_size: int, stated: int, wanted: int | None) -> int:
    """Decide the mask token's id.

    Args:
        files: the tokenizer.
        vocab_size: rows of the embedding.
        stated: what config.json says, or -1.
        wanted: what the user asks for, or None.

    Raises:
        ValueError: the id is unknown, contradictory, without an embedding row, or means something else.
    """
    own = files.mask_id()
    reserved = RESERVED_MASK_IDS.get(vocab_size, (None, ""))[0]
    candidates = (wanted, stated if stated >= 0 else None, reserved, own)
    mask_id = next((candidate for candidate in candidates if candidate is not None), None)
    if mask_id is None and files.exists and files.vocab_size < vocab_size:
        mask_id = files.vocab_size
        logger.warning(
            "neither config.json nor the tokenizer of %s has a mask token: it becomes %d, the first row of the "
            "embedding that no token has; --mask_token_id takes another",
            files.folder,
            mask_id,
        )
    if mask_id is None:
        raise ValueError(
            "mask_token_id (auto) cannot be found: neither config.json nor the tokenizer of "
            f"{files.folder} has a mask token, and no row of the embedding is free; add rows with "
            "checkpoints_tools.extend_vocab, or give --mask_token_id with the id of a reserved token."
        )
    if not 0 <= mask_id < vocab_size:
        raise ValueError(
            f"mask_token_id ({mask_id}) has no row in the embedding (vocab_size {vocab_size}); "
            "give the id of a reserved token below it."
        )
    if own is not None and own != mask_id:
        raise ValueError(
            f"mask_token_id ({mask_id}) differs from the tokenizer's own mask token ({own}, "
            f"{files.texts[own]}); serving would mask with the wrong token: use one id in both."
        )
    text = files.texts.get(mask_id)
    if text is not None and own != mask_id and not PLACEHOLDER.search(text):
        raise ValueError(
            f"mask_token_id ({mask_id}) is {text} in the tokenizer of {files.folder}, which gives it "
            "another meaning; convert from the base model, or give --tokenizer with one whose mask token "
            "has this id (LLaDA2's moved the other token away)."
        )
    return mask_id

"""What two tokenizers must have in common for their models to have a mean, however their files are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dllm.hf.encoding_fingerprint import encoding_fingerprint
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles


def tokenizer_meaning(folder: Path) -> dict[str, Any]:
    """How a tokenizer encodes text, and its tokens with a role; parts by name, so that a difference can be shown.

    Indentation, padding, truncation and the versions of libraries have no part in it.

    Args:
        folder: of the tokenizer; one without any says nothing but that.
    """
    files = TokenizerFiles(folder)
    if not files.exists:
        return {"tokenizer": None}
    steps = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {
        "tokenizer": (files.tokenizer.get("model") or {}).get("type", "without tokenizer.json"),
        **{f"tokenizer.{name}": files.tokenizer.get(name) for name in steps},
        **{f"tokenizer.{name}": files.special_id(name) for name in ("eos_token", "pad_token", "mask_token")},
        "tokenizer.vocab_size": files.vocab_size,
        "tokenizer.added_tokens": _added(files),
        # The last to be looked at: it tells apart whatever the parts above do not.
        "tokenizer.vocabulary (SHA-256)": encoding_fingerprint(files),
    }


def _added(files: TokenizerFiles) -> dict[str, int]:
    """Ids of the tokens that were added to the vocabulary."""
    return {token["content"]: token["id"] for token in files.tokenizer.get("added_tokens") or []}

"""Whether two tokenizer folders encode text alike: a hash over what decides that, and nothing else of tokenizer.json.

A base model's tokenizer is given a mask token when the model is converted, which changes the file and no text: mask
tokens never come from text. Neither do placeholders (<|reserved_9|>), one of which the mask token may have replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from megatron_dllm.hf.tokenizer_folder import TOKENIZER_FILE, TokenizerFiles

# A token nobody has given a meaning yet.
PLACEHOLDER = re.compile(r"reserved|unused|placeholder|extra_\d|dummy", re.IGNORECASE)
_STEPS = ("normalizer", "pre_tokenizer", "post_processor")


def encoding_fingerprint(files: TokenizerFiles) -> str | None:
    """SHA-256 over the parts of tokenizer.json that decide how text is encoded; None without that file."""
    if not (files.folder / TOKENIZER_FILE).is_file():
        return None
    mask_id = files.mask_id()
    mask = None if mask_id is None else files.texts.get(mask_id)
    model = files.tokenizer.get("model") or {}
    content = {
        **{name: files.tokenizer.get(name) for name in _STEPS},
        "model": {name: value for name, value in model.items() if name not in ("vocab", "merges")},
        "merges": [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []],
        "vocab": sorted(entry for entry in _entries(model.get("vocab") or {}) if _counts(entry[1], mask)),
        "added": sorted(
            json.dumps(token, sort_keys=True)
            for token in files.tokenizer.get("added_tokens") or []
            if _counts(token["content"], mask)
        ),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _counts(text: str, mask: str | None) -> bool:
    return text != mask and not PLACEHOLDER.search(text)


def _entries(vocabulary: dict[str, int] | list[list[Any]]) -> Iterator[tuple[int, str, float]]:
    """Id, text and score (0 where there is none) of each token of a vocabulary."""
    if isinstance(vocabulary, dict):
        yield from ((token_id, text, 0.0) for text, token_id in vocabulary.items())
    else:
        yield from ((token_id, text, score) for token_id, (text, score) in enumerate(vocabulary))

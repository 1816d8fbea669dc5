"""The second model that stages learn from: which one, and whether it can teach."""

from __future__ import annotations

from pathlib import Path

from megatron_dllm.checkpoint.folder import resolve_checkpoint
from megatron_dllm.checkpoint.identity import check_identity
from megatron_dllm.checkpoint.manifest import check_complete
from megatron_dllm.config import TrainConfig
from megatron_dllm.data.tokenizer import tokenizer_fingerprint
from megatron_dllm.hf.encoding_fingerprint import encoding_fingerprint
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles


def find_teacher(config: TrainConfig) -> Path | None:
    """The teacher's checkpoint; None where no stage learns from one.

    Raises:
        ValueError: it is gone, damaged, of another model, or predicts tokens by what stands behind them.
    """
    if not config.taught_stages or config.teacher.checkpoint is None:
        return None
    folder = resolve_checkpoint(Path(config.teacher.checkpoint))
    check_complete(folder)
    try:
        stored = check_identity(folder, config.model)
    except ValueError as error:
        raise ValueError(f"teacher.checkpoint must be of a model like the one that is trained: {error}") from None
    if stored.is_diffusion:
        raise ValueError(
            f"teacher.checkpoint ({config.teacher.checkpoint}) holds diffusion weights, and a teacher predicts the "
            "next token; name the autoregressive checkpoint that they came from."
        )
    _check_tokenizer(config, folder, stored.provenance.tokenizer)
    return folder


def _check_tokenizer(config: TrainConfig, folder: Path, tokenizer: str | None) -> None:
    """Refuse a teacher that reads text as other tokens; nothing is compared where either names no tokenizer."""
    if config.data.tokenizer is None or tokenizer is None:
        return
    theirs = encoding_fingerprint(TokenizerFiles(folder / tokenizer))
    if theirs not in (None, tokenizer_fingerprint(config.data.tokenizer)):
        raise ValueError(
            f"teacher.checkpoint ({config.teacher.checkpoint}) was trained with another tokenizer than data.tokenizer "
            f"({config.data.tokenizer}), so its tokens are other ones; name a teacher of the same vocabulary."
        )


def teacher_warnings(config: TrainConfig) -> list[str]:
    """A teacher without effect, in a sentence."""
    if config.teacher.checkpoint is None or config.taught_stages:
        return []
    return [
        f"teacher.checkpoint ({config.teacher.checkpoint}) has no effect, as no stage learns from it; leave it out, "
        "or give a stage's alignment or distill source teacher."
    ]

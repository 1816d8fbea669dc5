"""What a validation was measured on and how, so that only like is compared with like."""

from __future__ import annotations

from megatron_dllm.checkpoint.validation import Conditions
from megatron_dllm.config import SftConfig, TrainConfig
from megatron_dllm.data.source import Source
from megatron_dllm.diffusion.noise_spec import NoiseSpec

# Of the choice of documents, of their rows and of the noise.
SEED = 0


def conditions_of(
    config: TrainConfig, corpus: Source, num_tokens: int, sft: SftConfig | None = None, shift: bool = False
) -> Conditions:
    """The conditions of a measurement.

    Args:
        config: of the run that measures.
        corpus: held-out documents.
        num_tokens: document tokens that are measured, those of the fill not counted.
        sft: how chats lie in their rows; None: as they stand.
        shift: whether the first token of a block is predicted before it, and that of a document not at all.
    """
    blocks = config.data.block_origin
    if blocks == "row":  # then the rows decide which tokens share a block
        blocks += f" of {config.schedule.tokens_per_row} tokens, packed by {config.data.packing_chunk}"
    if config.evaluation.clean_block_size is not None:
        blocks += f", clean blocks of {config.evaluation.clean_block_size}"
    if sft is not None and corpus.spans is not None:
        blocks += f", fill {sft.fill}, turns {sft.turn_boundary}"
    if shift:
        blocks += ", shift"
    noise = {**NoiseSpec.for_validation().stated(), "seed": SEED}
    return Conditions(
        corpus=corpus.fingerprint,
        num_tokens=num_tokens,
        context_length=config.schedule.context_length,
        blocks=blocks,
        noise=" ".join(f"{name}={value}" for name, value in noise.items()),
        precision=config.parallel.precision,
    )

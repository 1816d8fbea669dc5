"""Give a model more rows in its vocabulary: `python -m checkpoints_tools.extend_vocab`.

For special tokens (a mask, roles, images), or for a vocabulary that tensor parallelism can divide. Takes a Hugging Face
folder or a torch_dist checkpoint and writes one of the same kind. The rows that are there keep their bits; a new one is
the mean of them plus some noise, or is read from a file. Streams, whatever the model's size.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import logging
import math
from pathlib import Path

from checkpoints_tools.command import prepare_tool, whole_number
from megatron_dllm.checkpoint.folder import is_hf_folder, resolve_checkpoint
from megatron_dllm.checkpoint.vocabulary.hf_side import HFSide
from megatron_dllm.checkpoint.vocabulary.side import NewVocabulary, extend
from megatron_dllm.checkpoint.vocabulary.torch_dist_side import TorchDistSide
from megatron_dllm.hf.added_tokens import added_ids

logger = logging.getLogger(__name__)
# What tensor parallelism and kernels of matrix products divide by.
_MULTIPLE = 64


def convert(
    source: Path,
    output: Path,
    vocab_size: int | None = None,
    tokens: tuple[str, ...] = (),
    noise: float = 0.1,
    seed: int = 0,
    rows: Path | None = None,
    keeps_optimizer: bool = False,
) -> None:
    """Extend one model.

    Args:
        source: Hugging Face folder, step folder, or run folder (its latest checkpoint).
        output: folder to make; must not exist.
        vocab_size: rows afterwards; None: enough for the tokens, a multiple of 64.
        tokens: special tokens that the tokenizer is given, at its first free ids.
        noise: on the mean, as a share of the standard deviation over the rows that are there.
        seed: of the noise.
        rows: safetensors file with the new rows, `embedding` and, if the output layer is one of its own,
            `output_layer`; None: drawn.
        keeps_optimizer: carry the optimizer's state along, with zeros for the new rows; else it is left behind.

    Raises:
        ValueError: anything wrong with the input, naming file and tensor; nothing is left behind.
    """
    side = HFSide(source) if is_hf_folder(source) else TorchDistSide(resolve_checkpoint(source), keeps_optimizer)
    try:
        if keeps_optimizer and isinstance(side, HFSide):
            raise ValueError(f"optimizer (keep): {source} is a Hugging Face folder, which has none; leave it out.")
        ids = added_ids(side.tokenizer, tokens)
        size = _settle_size(side.model.vocab_size, vocab_size, side.tokenizer.vocab_size, len(tokens))
        vocabulary = NewVocabulary(size, ids, noise, seed, rows)
        extend(side, output, vocabulary)
    finally:
        side.close()
    for text, token_id in ids.items():
        logger.info("token %d is %s", token_id, text)
    logger.info("vocab_size: %d, was %d", size, side.model.vocab_size)


def _settle_size(old: int, wanted: int | None, num_tokens: int, num_new: int) -> int:
    """Rows afterwards.

    Args:
        old: rows now.
        wanted: by the user, or None.
        num_tokens: of the tokenizer, before the new ones.
        num_new: tokens to add.
    """
    needed = num_tokens + num_new
    if wanted is None and needed <= old:
        raise ValueError(
            f"vocab_size (none given): the {old} rows of the model have room for {needed} tokens, so no row has to be "
            "added; give --vocab_size with the number of rows that you want."
        )
    size = math.ceil(needed / _MULTIPLE) * _MULTIPLE if wanted is None else wanted
    if size <= old or size < needed:
        raise ValueError(
            f"vocab_size ({size}) must exceed the {old} rows of the model and hold the {needed} tokens of its "
            f"tokenizer; give at least {max(old + 1, needed)}."
        )
    return size


def _noise(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"({text}) must be a number of at least 0")
    return value


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="Hugging Face folder, step folder or run folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument(
        "--vocab_size", type=whole_number(1), help="rows afterwards (default: enough for the tokens, a multiple of 64)"
    )
    parser.add_argument("--tokens", nargs="+", default=(), help="special tokens for the tokenizer, such as '<|mask|>'")
    parser.add_argument(
        "--noise", type=_noise, default=0.1, help="on the mean of the rows, in their standard deviations (default 0.1)"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the noise (default 0)")
    parser.add_argument("--rows", type=Path, help="safetensors file with the new rows: embedding, output_layer")
    parser.add_argument(
        "--optimizer",
        choices=("drop", "keep"),
        default="drop",
        help="state of a training checkpoint's optimizer (default: drop, for a new run)",
    )
    arguments = parser.parse_args()
    prepare_tool()
    convert(
        arguments.input,
        arguments.output,
        arguments.vocab_size,
        tuple(arguments.tokens),
        arguments.noise,
        arguments.seed,
        arguments.rows,
        arguments.optimizer == "keep",
    )


if __name__ == "__main__":
    run_command(main)

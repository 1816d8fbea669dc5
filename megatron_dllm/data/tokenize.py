"""Tokenizes text, chats or preference pairs into Megatron's .bin/.idx, the documents in the order of the input.

    python -m megatron_dllm.data.tokenize --input PATH ... --tokenizer DIR --output PREFIX
    python -m megatron_dllm.data.tokenize --input PATH ... --tokenizer DIR --output PREFIX --kind chat
    python -m megatron_dllm.data.tokenize --input PATH ... --tokenizer DIR --output PREFIX --kind pairs
    python -m megatron_dllm.data.tokenize --input PATH ... --tokenizer DIR --kind chat --inspect 3

A text ends in the tokenizer's end-of-text token. A chat is rendered by the tokenizer's chat template and ends where
its last answer ends; PREFIX.spans says which tokens the assistant says. A pair becomes two such documents, prompt and
chosen answer, prompt and rejected answer. `--inspect` shows the first chats or pairs with what the assistant says
coloured, and writes nothing. Writes PREFIX.bin and PREFIX.idx, PREFIX.sums with their checksums, and
PREFIX.json that says from what and with which tokenizer they were made; all under temporary names until
they are complete. The output does not depend on the number of workers. Documents that cannot be read are
counted and listed in PREFIX.bad_lines.txt; more of them than `--max_bad_fraction` is an error. What is left out of a
folder (unknown extensions, hidden files, second links to a file) is listed in PREFIX.json.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import logging
import os

from megatron_dllm.data.chat_encoding import OVERLONG, ChatEncoding
from megatron_dllm.data.chat_view import show_chats
from megatron_dllm.data.corpus_writing import TokenizeCounts, tokenize_corpus
from megatron_dllm.data.formats import KNOWN
from megatron_dllm.data.listing import list_files
from megatron_dllm.data.pair_encoding import PairEncoding, TemplateEncoding

logger = logging.getLogger("megatron_dllm.data.tokenize")  # also where this module runs as __main__


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dllm.data.tokenize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, help=f"files or folders: {KNOWN}")
    parser.add_argument("--tokenizer", required=True, help="folder of a HF fast tokenizer")
    parser.add_argument("--output", help="prefix of the files to write")
    parser.add_argument("--kind", choices=("text", "chat", "pairs"), default="text", help="what the documents are")
    parser.add_argument("--num_workers", type=int, default=len(os.sched_getaffinity(0)), help="tokenizing processes")
    parser.add_argument("--text_key", default="text", help="JSON key or parquet column of the text")
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="share of unreadable documents allowed")
    parser.add_argument(
        "--max_length", type=int, help="most tokens of a chat or of a side of a pair; the stage's context_length"
    )
    parser.add_argument("--overlong", choices=OVERLONG, help="what happens to longer chats (default: drop)")
    parser.add_argument("--inspect", type=int, metavar="N", help="show N chats or pairs and write nothing")
    parser.add_argument("--block_size", type=int, metavar="B", help="of the stage: --inspect shows the fill too")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logger.setLevel(logging.INFO)
    chats = _chats_of(options)
    if options.inspect is not None and chats:
        show_chats(list_files(options.input, None).files, chats, options.inspect, options.block_size)
        return 0
    counts = tokenize_corpus(
        options.input,
        options.tokenizer,
        options.output,
        num_workers=options.num_workers,
        text_key=options.text_key,
        chats=chats,
        max_bad_fraction=options.max_bad_fraction,
        overwrite=options.overwrite,
    )
    _report(options.output, counts)
    return 0


def _chats_of(options: argparse.Namespace) -> TemplateEncoding | None:
    """How chats or pairs become documents, None for text; refuses options that do not go together."""
    if options.output is None and options.inspect is None:
        raise ValueError("output (none) must be a prefix of the files to write; add --output.")
    if options.block_size is not None and options.inspect is None:
        raise ValueError(
            f"block_size ({options.block_size}) is for --inspect; rows are filled up when a stage trains them."
        )
    if options.kind == "chat":
        return ChatEncoding(options.tokenizer, options.max_length, options.overlong or "drop")
    if options.kind == "pairs":
        if options.overlong == "truncate":
            raise ValueError("overlong (truncate) is for chats alone: half an answer is no preference; leave it out.")
        return PairEncoding(options.tokenizer, options.max_length)
    for name in ("max_length", "overlong", "inspect", "block_size"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"{name} ({getattr(options, name)}) is for chats and pairs alone; add --kind, or leave it out."
            )
    return None


def _report(output: str, counts: TokenizeCounts) -> None:
    written = ".bin, .idx, .spans, .sums and .json" if counts.tally else ".bin, .idx, .sums and .json"
    logger.info(
        f"wrote {output}{written}: {counts.num_documents:,} documents, "
        f"{counts.num_tokens:,} tokens, {counts.num_bytes:,} bytes of text "
        f"({counts.num_bytes / counts.num_tokens:.2f} a token); left out "
        f"{counts.num_empty_documents:,} empty and {counts.num_bad_lines:,} bad documents"
    )
    if "num_pairs" in counts.tally:
        logger.info(_of_pairs(counts))
    elif counts.tally:
        logger.info(_of_chats(counts))


def _of_pairs(counts: TokenizeCounts) -> str:
    """What happened to the pairs, in a sentence."""
    tally, num_pairs = counts.tally, counts.num_documents // 2
    return (
        f"of {tally['num_pairs']:,} pairs {tally['num_equal_dropped']:,} had two equal answers, "
        f"{tally['num_empty_dropped']:,} an empty one, {tally['num_overlong_dropped']:,} were too long, and all these "
        f"were dropped; a chosen answer has {tally['num_chosen_tokens'] / num_pairs:.1f} tokens, a rejected one "
        f"{tally['num_rejected_tokens'] / num_pairs:.1f}"
    )


def _of_chats(counts: TokenizeCounts) -> str:
    """What happened to the chats, in a sentence."""
    tally = counts.tally
    return (
        f"of {tally['num_chats']:,} chats {tally['num_split_chats']:,} became several documents, as the template "
        f"renders their earlier turns in another way; {tally['num_overlong_dropped']:,} documents were too long "
        f"and dropped, {tally['num_overlong_truncated']:,} truncated; {tally['num_supervised_tokens']:,} tokens "
        f"({tally['num_supervised_tokens'] / counts.num_tokens:.1%}) carry a loss"
    )


if __name__ == "__main__":
    run_command(main)

"""Look at a packed row and its attention mask.

    python -m examples.packed_row [FILE ...] [--output packed_row.png] [--block_size 16] [--two_views]

Tokenizes the text files (this project's own pages if you name none), packs their documents into rows, prints the
tokens of one row with their roles, and draws which token attends to which. Takes a few seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from examples.corpus import documents_of, make_corpus
from megatron_dllm.compose import compose_train_config
from megatron_dllm.data.batch import Batch
from megatron_dllm.reporting.example_row import row_of
from megatron_dllm.reporting.pictures import mask_picture

CONTEXT_LENGTH = 64


def settings(block_size: int, has_two_views: bool) -> list[str]:
    """The overrides that make rows short enough to look at."""
    stage, num_views = "schedule.stages.convert", 2 if has_two_views else 1
    views = [f"{stage}.num_views=2", f"{stage}.view_relation=complementary", f"{stage}.t_max=0.999"]
    return [
        f"schedule.context_length={CONTEXT_LENGTH}",
        f"schedule.row_length={(num_views + 1) * CONTEXT_LENGTH}",
        f"{stage}.block_size={block_size}",
        *(views if has_two_views else []),
    ]


def token_table(batch: Batch, tokenizer: Tokenizer) -> Table:
    """The tokens of the first row, one line a run of tokens that share their roles."""
    table = Table("doc", "block", "view", "tokens (░ is masked)", title="One row")
    line: list[str] = []
    roles = batch.roles[0].tolist()
    for index, (role, token) in enumerate(zip(roles, batch.input_ids[0].tolist(), strict=True)):
        line.append("░" if batch.is_masked[0, index] else tokenizer.decode([token], skip_special_tokens=False))
        if index + 1 == len(roles) or roles[index + 1] != role:
            text = "".join(line).replace("\n", "⏎")
            table.add_row(*(("-", "-", "-", "padding") if role[0] < 0 else (*map(str, role), text)))
            line = []
    return table


def main(words: list[str] | None = None) -> int:
    """Draw the row; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="text files, each a document")
    parser.add_argument("--output", type=Path, default=Path("packed_row.png"), help="picture to write")
    parser.add_argument("--block_size", type=int, default=16, help="tokens denoised together; divides 64")
    parser.add_argument("--two_views", action="store_true", help="two noisy views with opposite masks")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        overrides = make_corpus(documents_of(arguments.files), Path(folder))
        overrides += settings(arguments.block_size, arguments.two_views)
        config = compose_train_config(["experiment=own_text", *overrides])
        config.validate(world_size=1)
        row = row_of(config, config.train_corpora[-1])
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")
    console = Console()
    console.print(token_table(row.batch, tokenizer))
    arguments.output.write_bytes(mask_picture(row.batch))
    console.print(f"{row.caption}; its mask: {arguments.output}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

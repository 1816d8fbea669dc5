"""Compare every byte of corpora with what was recorded when they were written.

    python -m megatron_dllm.data.verify PREFIX ...
    python -m megatron_dllm.data.verify PREFIX --record

A run looks at less before it starts, and at the pages of .bin when it reads them; this looks at everything now. A
corpus without PREFIX.sums (of Megatron, or of an earlier version) has its index checked; `--record` takes its content
as it is and writes PREFIX.sums.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import sys

from megatron_dllm.data.corpus import recorded_fingerprint
from megatron_dllm.data.index_file import check_files, check_index
from megatron_dllm.data.sums_file import content_fingerprint, read_sums, write_sums


def verify(prefix: str, is_recording: bool = False) -> str:
    """Check one corpus; returns what was found, in a sentence.

    Args:
        prefix: path without suffix.
        is_recording: whether to write PREFIX.sums where there is none.

    Raises:
        ValueError: it is damaged, or not the one that was recorded.
    """
    check_files(prefix)
    num_tokens = check_index(prefix)
    sums = read_sums(prefix)
    recorded, found = recorded_fingerprint(prefix), content_fingerprint(prefix, sums)
    if recorded not in (None, found):
        raise ValueError(
            f"corpus {prefix} (fingerprint {found[:12]}) differs from the one that was recorded ({recorded[:12]}): it "
            "was damaged or changed after it was written; copy or tokenize it again."
        )
    if sums is None and is_recording:
        write_sums(prefix)
        return f"{prefix}: {num_tokens:,} tokens, fingerprint {found}; wrote {prefix}.sums"
    if recorded is None:
        return f"{prefix}: {num_tokens:,} tokens, index in order, nothing recorded to compare the tokens with: --record"
    return f"{prefix}: {num_tokens:,} tokens, every byte as it was written, fingerprint {found}"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dllm.data.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path of a corpus, without suffix")
    parser.add_argument("--record", action="store_true", help="write PREFIX.sums where there is none")
    options = parser.parse_args(arguments)
    status = 0
    for prefix in options.prefixes:
        try:
            print(verify(prefix, options.record))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    run_command(main)

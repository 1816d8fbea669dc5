"""What a blend costs: CPU time to plan a row of three corpora and of one, and to read a segment with its checksums.

    python -m benchmarks.blend

Rows are planned by the program's own code as its loader does it: the tokens of every row are counted, and the position
is taken after every 64 rows. All corpora
have documents of log-normal length; the single one holds the documents of the three.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from numpy.typing import NDArray

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.config import ModelConfig
from megatron_dllm.data.blend_stream import BlendStream
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import RowSequence
from megatron_dllm.data.packing import LENGTH, RowStream, row_document_tokens, row_forward_tokens
from megatron_dllm.data.sums_file import write_sums

SHARES = (0.5, 0.3, 0.2)
ROWS_PER_STEP, CHUNK, CONTEXT_LENGTH = 64, 1024, 4096
NOTE = (
    "microseconds_per_row: CPU time of planning, mean over the rows, least of the repeats. ratio: to the rows of one "
    "corpus. largest_error: of the realised shares, in percentage points. Of segments: CPU time of reading one of 700 "
    "tokens at a random place, without and with PREFIX.sums."
)


@dataclass(frozen=True)
class Lengths:
    """A corpus that is planned and never read."""

    name: str
    document_lengths: NDArray[np.int64]
    spans: None = None
    num_bytes: None = None
    chat_template: None = None
    is_paired: bool = False

    @property
    def fingerprint(self) -> str:
        """Its name."""
        return self.name

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.document_lengths.sum())

    def verify(self) -> None:
        """Nothing can be damaged."""

    def read(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """Zeros."""
        return np.zeros(length, np.int64)

    def sample_id(self, document: int, offset: int) -> int:
        """The document's number."""
        return document


def made_corpora(num_documents: int, median: float, sigma: float) -> list[Lengths]:
    """One corpus for each share."""
    rng = np.random.default_rng(0)
    drawn = [np.maximum(rng.lognormal(np.log(median), sigma, num_documents), 1).astype(np.int64) for _ in SHARES]
    return [Lengths(f"corpus {number}", lengths) for number, lengths in enumerate(drawn)]


def blend_of(corpora: list[Lengths]) -> BlendStream:
    """The rows of the corpora in their shares."""
    stream = BlendStream(corpora, 0, CHUNK)
    stream.use(dict(zip((corpus.fingerprint for corpus in corpora), SHARES, strict=True)))
    return stream


def plan_rows(stream: RowSequence, geometry: RowGeometry, num_rows: int) -> float:
    """Plan rows; returns microseconds of CPU time a row."""
    started = time.process_time()
    for row in range(num_rows):
        lengths = stream.next(geometry).segments[:, LENGTH]
        row_document_tokens(geometry, lengths), row_forward_tokens(geometry, lengths)
        if row % ROWS_PER_STEP == 0:
            stream.state_dict()
    return 1e6 * (time.process_time() - started) / num_rows


def largest_error(stream: BlendStream) -> float:
    """Of the realised shares, in percentage points."""
    (blend,) = stream.state_dict()["blends"]
    realised = [count / sum(blend["tokens"]) for count in blend["tokens"]]
    return max(abs(share - wanted) for share, wanted in zip(realised, SHARES, strict=True)) * 100


def measure_rows(corpora: list[Lengths], num_rows: int, repeats: int) -> list[dict[str, Any]]:
    """Planning rows of one corpus and of three."""
    geometry = RowGeometry("block_diffusion", 32, CONTEXT_LENGTH, 2 * CONTEXT_LENGTH, 1)
    together = np.concatenate([corpus.document_lengths for corpus in corpora])
    one, three, error = [], [], 0.0
    for _ in range(repeats):
        one.append(plan_rows(RowStream(together, 0, CHUNK), geometry, num_rows))
        stream = blend_of(corpora)
        three.append(plan_rows(stream, geometry, num_rows))
        error = largest_error(stream)
    return [
        dict(corpora=1, microseconds_per_row=round(min(one), 1), ratio=1.0, largest_error=None),
        dict(
            corpora=3,
            microseconds_per_row=round(min(three), 1),
            ratio=round(min(three) / min(one), 3),
            largest_error=float(f"{error:.2g}"),
        ),
    ]


def measure_reads(folder: Path, num_reads: int) -> list[dict[str, Any]]:
    """Reading segments with and without checksums."""
    prefix, rng = str(folder / "corpus"), np.random.default_rng(0)
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.int32)
    for _ in range(2000):
        builder.add_document(rng.integers(3, 1000, 1400).astype(np.int32), [1400])
    builder.finalize(prefix + ".idx")
    places = list(zip(rng.integers(0, 2000, num_reads).tolist(), rng.integers(0, 700, num_reads).tolist(), strict=True))

    def microseconds(read: Callable[[int, int, int], Any]) -> float:
        started = time.process_time()
        for document, offset in places:
            read(document, offset, 700)
        return round(1e6 * (time.process_time() - started) / num_reads, 1)

    model = ModelConfig(vocab_size=1000, mask_token_id=2)
    plain = microseconds(Corpus(prefix, model).read)
    write_sums(prefix)
    checked = microseconds(Corpus(prefix, model).read)
    return [dict(checksums="no", microseconds=plain), dict(checksums="yes", microseconds=checked)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--documents", type=int, default=300_000, help="of each of the three corpora")
    parser.add_argument("--median", type=float, default=700.0, help="tokens of the median document")
    parser.add_argument("--sigma", type=float, default=1.2, help="of the logarithm of the length")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--output", type=Path, default=RESULTS / "blend", help="without suffix")
    args = parser.parse_args()
    about = machine() | {name: getattr(args, name) for name in ("rows", "documents", "median", "sigma", "repeats")}
    rows = measure_rows(made_corpora(args.documents, args.median, args.sigma), args.rows, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        reads = measure_reads(Path(folder), args.reads)
    write_results(
        args.output, "Rows of a blend, and checksums while reading", about, dict(rows=rows, segments=reads), NOTE
    )


if __name__ == "__main__":
    main()

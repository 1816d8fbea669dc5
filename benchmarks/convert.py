"""hf_to_mcore and mcore_to_hf against `cp` of the same bytes: wall time, as a ratio, and peak memory.

    python -m benchmarks.convert --gigabytes 8 --folder /tmp/convert       # needs 3 x 8 GB of disk
    python -m benchmarks.convert --gigabytes 0.3                           # quick

Every command starts with a cold page cache and is timed until its output is on the disk (fsync).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks.measure import evict, model_of_size, run, shell, size_of, tool
from benchmarks.record import RESULTS, machine, table, write_results
from benchmarks.synthetic import write_synthetic
from checkpoints_tools.compare import compare


def measure(folder: Path, gigabytes: float, repetitions: int) -> list[dict[str, object]]:
    """Measure in `folder` (empty); the best of the repetitions counts."""
    source, copy, mcore, back = folder / "hf", folder / "copy", folder / "mcore", folder / "back"
    write_synthetic(source, model_of_size(gigabytes * 1e9))
    commands = {
        "cp": (shell(f"cp -r '{source}' '{copy}'; sync -f '{copy}'"), source, copy),
        "hf_to_mcore": (tool("hf_to_mcore", "--hf", source, "--output", mcore), source, mcore),
        "mcore_to_hf": (tool("mcore_to_hf", "--checkpoint", mcore, "--output", back), mcore, back),
    }
    best: dict[str, tuple[float, int]] = {}
    for repetition in range(repetitions):
        for name, (command, reads, writes) in commands.items():
            shutil.rmtree(writes, ignore_errors=True)
            evict(reads)
            found = run(command)
            evict(writes)
            seconds, peak = best.get(name, (float("inf"), 0))
            best[name] = (min(seconds, found.seconds), max(peak, found.peak_rss))
            print(f"{repetition} {name}: {found.seconds:.1f} s, {found.peak_rss / 1e6:.0f} MB", flush=True)
            if writes == copy:
                shutil.rmtree(copy)
    shutil.rmtree(copy, ignore_errors=True)
    assert compare(source, back).is_equal, "the round trip changed the weights"
    size = size_of(source) / 1e9
    return [
        {
            "command": name,
            "GB": size,
            "seconds": seconds,
            "GB/s": size / seconds,
            "ratio to cp": seconds / best["cp"][0],
            "peak RSS, MB": peak // 10**6,
        }
        for name, (seconds, peak) in best.items()
    ]


def main() -> None:
    """Parse the command line, measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.3)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "convert", help="without suffix")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="convert-") as folder:
        rows = measure(Path(folder), arguments.gigabytes, arguments.repetitions)
    print(table(rows))
    write_results(
        arguments.output,
        "Conversion, against cp of the same bytes",
        machine() | {"repetitions": arguments.repetitions},
        {"rows": rows},
    )


if __name__ == "__main__":
    main()

"""merge_topk against reading the same files and writing one, and against mergekit's linear merge.

    python -m benchmarks.merge --gigabytes 2 --k 5 --mergekit VENV/bin/mergekit-yaml     # needs (k + 3) x 2 GB of disk
    python -m benchmarks.merge --gigabytes 0.05                                          # quick

mergekit comes from PyPI, in a virtual environment of its own. The model is a dense Qwen3, whose tensor names
mergekit knows. Every command starts with a cold page cache and is timed until its output is on the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from benchmarks.measure import Measurement, evict, model_of_size, run, shell, size_of, tool
from benchmarks.record import RESULTS, machine, table, write_results
from benchmarks.synthetic import write_synthetic
from checkpoints_tools import hf_to_mcore
from checkpoints_tools.compare import compare


def measure(folder: Path, gigabytes: float, k: int, repetitions: int, mergekit: Path | None) -> list[dict[str, object]]:
    """Measure in `folder` (empty); the best of the repetitions counts."""
    model = model_of_size(gigabytes * 1e9, "qwen3")
    sources = [folder / f"hf{number}" for number in range(k)]
    for number, source in enumerate(sources):
        write_synthetic(source, model, seed=number)
    rows = _measure_format("hf", sources, folder, repetitions, mergekit)
    for number, source in enumerate(sources):
        hf_to_mcore.convert(source, folder / f"mcore{number}", model.mask_token_id)
        shutil.rmtree(source)
    return rows + _measure_format(
        "torch_dist", [folder / f"mcore{number}" for number in range(k)], folder, repetitions, None
    )


def _measure_format(
    name: str, sources: list[Path], folder: Path, repetitions: int, mergekit: Path | None
) -> list[dict[str, object]]:
    pattern = {"hf": "*.safetensors", "torch_dist": "*.distcp"}[name]
    files = " ".join(f"'{source}'/{pattern}" for source in sources)
    commands = {
        f"read {len(sources)}, write 1": (
            shell(f"cat {files} > /dev/null; cp -r '{sources[0]}' '{folder / 'copy'}'; sync -f '{folder / 'copy'}'"),
            folder / "copy",
        ),
        "merge_topk": (tool("merge_topk", "--checkpoints", *sources, "--output", folder / "merged"), folder / "merged"),
    }
    if mergekit is not None:
        (folder / "merge.yaml").write_text(
            json.dumps(
                {
                    "merge_method": "linear",
                    "dtype": "bfloat16",
                    "models": [{"model": str(source), "parameters": {"weight": 1.0}} for source in sources],
                }
            )
        )
        script = (
            f"'{mergekit}' '{folder / 'merge.yaml'}' '{folder / 'kit'}' --no-copy-tokenizer --out-shard-size 5B; "
            f"sync -f '{folder / 'kit'}'"
        )
        commands["mergekit linear"] = (shell(script), folder / "kit")
    best: dict[str, Measurement] = {}
    for _ in range(repetitions):
        for label, (command, target) in commands.items():
            shutil.rmtree(target, ignore_errors=True)
            evict(*sources)
            found = run(command)
            before = best.get(label, found)
            best[label] = Measurement(min(before.seconds, found.seconds), max(before.peak_rss, found.peak_rss))
            print(f"{name} {label}: {found.seconds:.1f} s, {found.peak_rss / 1e6:.0f} MB", flush=True)
            if label.startswith("read"):
                shutil.rmtree(target)
    if mergekit is not None:
        worst = max(compare(folder / "merged", folder / "kit").values, key=lambda item: item.largest)
        print(f"largest difference to mergekit's result: {worst.largest:.3g} ({worst.name})")
    baseline = next(iter(best.values())).seconds
    size = size_of(sources[0]) / 1e9
    for _, target in commands.values():
        shutil.rmtree(target, ignore_errors=True)
    return [
        {
            "format": name,
            "command": label,
            "GB each": size,
            "seconds": found.seconds,
            "ratio": found.seconds / baseline,
            "peak RSS, MB": found.peak_rss // 10**6,
        }
        for label, found in best.items()
    ]


def main() -> None:
    """Parse the command line, measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.05, help="of each checkpoint")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--mergekit", type=Path, help="path of the mergekit-yaml executable")
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "merge", help="without suffix")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="merge-") as folder:
        rows = measure(Path(folder), arguments.gigabytes, arguments.k, arguments.repetitions, arguments.mergekit)
    print(table(rows))
    write_results(
        arguments.output,
        "Merging, against reading the inputs and writing one",
        machine() | {"k": arguments.k, "repetitions": arguments.repetitions},
        {"rows": rows},
    )


if __name__ == "__main__":
    main()

"""One part of the acceptance run in a process of its own: every row is on the disk before the next is measured.

python -m benchmarks.gpu.part NAME --device cuda --folder DIR --seconds 60
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.settings import Settings


def main() -> None:
    """Command line; the rows go to FOLDER.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--folder", type=Path, required=True, help="scratch; beside it lie the rows")
    parser.add_argument("--seconds", type=float, required=True, help="after these no further row is begun")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.device, args.small, args.folder, args.seconds)
    with args.folder.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
        for row in PARTS[args.name].rows(settings):
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


if __name__ == "__main__":
    main()

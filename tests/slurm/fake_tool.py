"""Stand-in for a tool: writes under a temporary name, then renames; of several ranks the first writes for all."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seconds", type=float, default=0.0)
    arguments = parser.parse_args()
    if os.environ.get("RANK", "0") != "0":
        sys.exit()
    output: Path = arguments.output
    assert not output.exists(), f"{output} exists"
    temporary = output.with_name(output.name + ".begun")
    temporary.write_text(arguments.text.replace("RANKS", os.environ.get("WORLD_SIZE", "")))
    time.sleep(arguments.seconds)
    os.replace(temporary, output)
    print(f"wrote {output}")

"""Stand-in for a tool: writes under a temporary name, then renames."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seconds", type=float, default=0.0)
    arguments = parser.parse_args()
    output: Path = arguments.output
    assert not output.exists(), f"{output} exists"
    temporary = output.with_name(output.name + ".begun")
    temporary.write_text(arguments.text)
    time.sleep(arguments.seconds)
    os.replace(temporary, output)
    print(f"wrote {output}")

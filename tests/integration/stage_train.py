"""Stand-in for megatron_dllm.train that does one stage of its schedule per attempt, on the ranks that it asks for."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_dllm.checkpoint.manifest import checksum, payload_files
from megatron_dllm.run.exit_codes import EXIT_LAYOUT
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import CONTRACT, MANIFEST, STATE


def write_checkpoint(folder: Path, state: dict[str, object]) -> None:
    """A whole checkpoint, as far as its descriptions go."""
    write_json(folder / CONTRACT, {})
    write_json(folder / STATE, state)
    write_json(folder / MANIFEST, {name: checksum(folder / name) for name in payload_files(folder)})


def given_config() -> dict[str, Any]:
    """The configuration that the launcher hands to megatron_dllm.train, as it stands in the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-dir", type=Path, required=True)
    parser.add_argument("--config-name", required=True)
    arguments = parser.parse_args()
    return yaml.safe_load((arguments.config_dir / f"{arguments.config_name}.yaml").read_text())


def train() -> int:
    config = given_config()
    checkpoints = Path(config["run"]["root"]) / config["run"]["name"] / "checkpoints"
    latest = checkpoints / "latest"
    done = json.loads((checkpoints / latest.read_text() / "state.json").read_text())["done"] if latest.exists() else []
    stages = config["schedule"]["stages"]
    name = list(stages)[len(done)]
    ranks = int(os.environ["WORLD_SIZE"])
    assert ranks == stages[name]["world_size"], f"{name} needs other ranks"
    done = [*done, name]
    folder = checkpoints / f"step_{len(done)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank_{os.environ['RANK']}").touch()
    if os.environ["RANK"] == "0":
        while len(list(folder.iterdir())) < ranks:  # all must have read `latest`
            time.sleep(0.05)
        consumed = sum(stages[stage]["num_tokens"] for stage in done)
        write_checkpoint(folder, {"done": done, "consumed_tokens": consumed})
        latest.write_text(folder.name)
    return EXIT_LAYOUT if len(done) < len(stages) else 0


if __name__ == "__main__":
    sys.exit(train())

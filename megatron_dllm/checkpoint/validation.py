"""validation.json: what a checkpoint was evaluated to, by block size.

Pure standard library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dllm.checkpoint.manifest import read_json
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import VALIDATION


def read_validation(folder: Path) -> dict[str, Any] | None:
    """Read validation.json, or None where the checkpoint was not evaluated.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / VALIDATION
    if not path.is_file():
        return None
    content = read_json(path)
    for part in ("elbo", "bits_per_byte"):
        values = content.get(part) or {}
        if not isinstance(values, dict) or not all(isinstance(value, (int, float)) for value in values.values()):
            raise ValueError(f"{path} is damaged ({part} holds no numbers); evaluate the checkpoint again.")
    return {"elbo": {}, "bits_per_byte": {}, "target_block_size": None} | {
        name: value for name, value in content.items() if value is not None
    }


def write_validation(folder: Path, content: dict[str, Any]) -> None:
    """Write validation.json of a checkpoint that is there already."""
    write_json(folder / VALIDATION, content, sort_keys=True)


def validation_elbo(folder: Path) -> float | None:
    """ELBO at the target block size in nats per token, or None where the checkpoint was not evaluated."""
    validation = read_validation(folder)
    return validation["elbo"].get(str(validation["target_block_size"])) if validation else None

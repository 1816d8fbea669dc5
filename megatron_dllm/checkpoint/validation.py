"""validation.json: what a checkpoint was evaluated to, by block size, and under which conditions.

Pure standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_dllm.checkpoint.manifest import read_json
from megatron_dllm.checkpoint.typed import read_fields
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import VALIDATION


@dataclass(frozen=True)
class Conditions:
    """What a measurement depends on besides the model and the block size: equal ones can be compared.

    Attributes:
        corpus: fingerprint of the held-out documents.
        num_tokens: document tokens that were measured.
        context_length: tokens of the longest segment.
        blocks: where blocks begin to count, and by which rows if the rows decide.
        noise: how masked tokens are drawn.
        precision: of the model's numbers.
    """

    corpus: str
    num_tokens: int
    context_length: int
    blocks: str
    noise: str
    precision: str


@dataclass(frozen=True)
class Validation:
    """What came of a measurement.

    Attributes:
        nats_per_token: by block size as text, or under "ar": the exact NLL of an autoregressive model.
        bits_per_byte: the same in bits per byte of UTF-8 text, comparable between tokenizers; empty where the bytes
            are not known.
        target_block_size: the one that ranks checkpoints; 0 for an autoregressive model, None where none is named.
        conditions: of the measurement; None in files of earlier versions.
    """

    nats_per_token: Mapping[str, float]
    bits_per_byte: Mapping[str, float] = field(default_factory=dict)
    target_block_size: int | None = None
    conditions: Conditions | None = None

    @property
    def elbo(self) -> float | None:
        """ELBO at the target block size in nats per token."""
        return self.nats_per_token.get(str(self.target_block_size))

    def difference(self, other: Validation) -> str:
        """What makes two measurements incomparable, in words; empty where nothing does."""
        mine, others = self.conditions, other.conditions
        if mine == others:
            return ""
        if mine is None or others is None:
            return "the conditions of one of them were not recorded"
        named = [
            f"{item.name} {getattr(mine, item.name)}, not {getattr(others, item.name)}"
            for item in fields(Conditions)
            if getattr(mine, item.name) != getattr(others, item.name)
        ]
        return "; ".join(named)


def read_validation(folder: Path) -> Validation | None:
    """Read validation.json, or None where the checkpoint was not evaluated.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / VALIDATION
    return read_validation_file(path) if path.is_file() else None


def read_validation_file(path: Path) -> Validation:
    """Read what an evaluation wrote.

    Raises:
        ValueError: it is damaged.
    """
    content = read_json(path)
    for part in ("elbo", "bits_per_byte"):
        values = content.get(part) or {}
        if not isinstance(values, dict) or not all(type(value) in (int, float) for value in values.values()):
            raise ValueError(f"{path} is damaged ({part} holds no numbers); evaluate the checkpoint again.")
    target = content.get("target_block_size")
    if target is not None and type(target) is not int:
        raise ValueError(f"{path} is damaged (target_block_size is no number); evaluate the checkpoint again.")
    conditions = content.get("conditions")
    return Validation(
        content.get("elbo") or {},
        content.get("bits_per_byte") or {},
        target,
        None if conditions is None else _read_conditions(conditions, path),
    )


def _read_conditions(value: object, path: Path) -> Conditions:
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (conditions is no object); evaluate the checkpoint again.")
    return read_fields(Conditions, value, f"{path}: conditions.")


def to_json(validation: Validation) -> dict[str, Any]:
    """What the file holds."""
    content: dict[str, Any] = {
        "elbo": dict(validation.nats_per_token),
        "bits_per_byte": dict(validation.bits_per_byte),
        "target_block_size": validation.target_block_size,
    }
    if validation.conditions is not None:
        content["conditions"] = asdict(validation.conditions)
    return content


def write_validation(folder: Path, validation: Validation) -> None:
    """Write validation.json of a checkpoint that is there already."""
    write_validation_file(folder / VALIDATION, validation)


def write_validation_file(path: Path, validation: Validation) -> None:
    """Write what an evaluation came to."""
    write_json(path, to_json(validation), sort_keys=True)


def validation_elbo(folder: Path) -> float | None:
    """ELBO at the target block size in nats per token, or None where the checkpoint was not evaluated."""
    validation = read_validation(folder)
    return validation.elbo if validation else None

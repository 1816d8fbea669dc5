"""What the scores of a file depend on, and whether those of a run depend on the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REMEDY = "score the pairs again (evaluate ... scores=FILE), or restore the setting"


@dataclass(frozen=True)
class ScoresHeader:
    """What scores depend on.

    Attributes:
        checkpoint: fingerprint of the weights.
        corpus: fingerprint of the documents.
        chat_template: SHA-256 of the template that rendered them.
        seed: of the order of the documents and of the noise.
        block_size: tokens denoised together.
        context_length: longest document.
        fill: what fills the last block of an answer.
        turn_boundary: what an answer's block shows beside it.
        precision: of the model.
        noise: fields of `diffusion.noise_spec.NoiseSpec`, the number of views among them.
        num_documents: of the corpus.
        num_epochs: passes over it that are scored, from the first one on.
    """

    checkpoint: str
    corpus: str
    chat_template: str | None
    seed: int
    block_size: int
    context_length: int
    fill: str
    turn_boundary: str
    precision: str
    noise: Mapping[str, Any]
    num_documents: int
    num_epochs: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Epochs, documents and views."""
        return self.num_epochs, self.num_documents, int(self.noise["num_views"])


def check_header(path: Path, header: ScoresHeader, ours: ScoresHeader) -> None:
    """Refuse scores that a run with other settings made.

    Args:
        path: of the file, for the message.
        header: of the file.
        ours: of this run; its number of epochs is the least that the file must have.

    Raises:
        ValueError: naming the first setting that differs, and both values.
    """
    if header.num_epochs < ours.num_epochs:
        raise ValueError(
            f"{path} holds the scores of {header.num_epochs} epochs, each of which has noise of its own, and the "
            f"schedule reads the corpus {ours.num_epochs} times; score that many, or shorten the schedule."
        )
    found, own = (dict(_flat(asdict(stated))) for stated in (header, ours))
    for name in found | own:  # of both: a file of another version may lack a field of the noise
        if name != "num_epochs" and found.get(name) != own.get(name):
            raise ValueError(f"{path}: {name} ({found.get(name)}) differs from this run's ({own.get(name)}); {REMEDY}.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

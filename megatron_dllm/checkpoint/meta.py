"""contract.json: the model in a checkpoint, what its outputs mean, how far it was trained, where it comes from.

One reader and one writer; everybody else handles the values. Pure standard library, as retention and the launcher run
without packages: the model stays the plain table that the file holds, and stored_model.py makes a ModelConfig of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_dllm.checkpoint.manifest import read_json
from megatron_dllm.checkpoint.typed import T, read_fields
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import CONTRACT, STATE

FORMAT = 1


@dataclass(frozen=True)
class RunSemantics:
    """What does not change inside one run.

    Attributes:
        block_origin: where blocks begin to count: "document" or "row".
        mask_token_id: the token that stands for one not known yet.
        context_length: tokens of the longest segment.
    """

    block_origin: str
    mask_token_id: int
    context_length: int


@dataclass(frozen=True)
class Semantics(RunSemantics):
    """What the model's outputs mean; the part `contract` of the file.

    Attributes:
        shift: position i predicts token i + 1; else token i.
        block_size: tokens denoised together; 1 for autoregressive models. With a shift, the first of them is predicted
            by the clean block before, so blocks of 1 token are an autoregressive model.
        clean_block_size: clean tokens that see each other; None: block_size.
    """

    shift: bool
    block_size: int
    clean_block_size: int | None = None

    @property
    def clean_grid(self) -> int:
        """`clean_block_size` with its default filled in."""
        return self.block_size if self.clean_block_size is None else self.clean_block_size


@dataclass(frozen=True)
class Position:
    """How far the model was trained.

    Attributes:
        step: optimizer steps.
        consumed_tokens: document tokens.
        stage: of the schedule; None for a converted model.
        is_stage_end: the stage ended here.
        is_validated: an evaluation belongs to the checkpoint, though it may not have been made yet.
        save_number: counts the checkpoints at the interval; None for others.
    """

    step: int = 0
    consumed_tokens: int = 0
    stage: str | None = None
    is_stage_end: bool = False
    is_validated: bool = False
    save_number: int | None = None


@dataclass(frozen=True)
class Provenance:
    """Where the checkpoint comes from.

    Attributes:
        layout: parallel layout of the run that saved it; None for one that a tool wrote.
        world_size: ranks of that run.
        tokenizer: the tokenizer's folder, relative to the checkpoint's.
        source: what the weights were first converted from.
    """

    layout: Mapping[str, Any] | None = None
    world_size: int | None = None
    tokenizer: str | None = None
    source: str | None = None

    @property
    def precision(self) -> str | None:
        """In which the run trained, if a run saved it."""
        value = (self.layout or {}).get("precision")
        return None if value is None else str(value)


@dataclass(frozen=True)
class CorpusRecord:
    """A corpus that the checkpoint's stage trains on.

    Attributes:
        name: the last part of its path.
        fingerprint: what tells its content from any other.
        share: of the document tokens of the stage.
        num_tokens: that it holds.
        chat_template: SHA-256 of the template that rendered its chats; None for text.
    """

    name: str
    fingerprint: str
    share: float
    num_tokens: int
    chat_template: str | None = None


@dataclass(frozen=True)
class CheckpointMeta:
    """All that contract.json says.

    Attributes:
        model: fields of ModelConfig; see `stored_model`.
        semantics: what the outputs mean.
        position: how far it was trained.
        provenance: where it comes from.
        corpora: what its stage trains on; none for a converted model.
        sft: how its stage trains chats, the fields of SftConfig; None where it does not.
    """

    model: Mapping[str, Any]
    semantics: Semantics
    position: Position = field(default_factory=Position)
    provenance: Provenance = field(default_factory=Provenance)
    corpora: tuple[CorpusRecord, ...] = ()
    sft: Mapping[str, Any] | None = None

    @property
    def is_diffusion(self) -> bool:
        """Whether it denoises blocks; else it is autoregressive."""
        return not self.semantics.shift or self.semantics.block_size > 1


def read_meta(folder: Path) -> CheckpointMeta:
    """Read contract.json of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, of another format, or says of the outputs what we do not know.
    """
    path = folder / CONTRACT
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format ({content.get('format')}) is not {FORMAT}; "
            "convert the checkpoint with the version that wrote it."
        )
    for part in ("model", "contract"):
        if not isinstance(content.get(part), dict):
            raise ValueError(f"{path} is damaged (no object {part}); choose another checkpoint.")
    place = f"{path}: "
    return CheckpointMeta(
        model=content["model"],
        semantics=_read_semantics(content["contract"], f"{place}contract."),
        position=_read_part(Position, content, place),
        provenance=_read_part(Provenance, content, place),
        corpora=_read_corpora(content.get("corpora", []), place),
        sft=_read_sft(content.get("sft"), place),
    )


def _read_semantics(table: Mapping[str, Any], place: str) -> Semantics:
    semantics = read_fields(Semantics, table, place)
    for name in ("block_size", "context_length"):
        if getattr(semantics, name) < 1:
            raise ValueError(
                f"{place}{name} ({getattr(semantics, name)}) must be at least 1: the file is damaged; choose another."
            )
    if semantics.clean_grid < 1 or semantics.block_size % semantics.clean_grid:
        raise ValueError(
            f"{place}clean_block_size ({semantics.clean_grid}) must divide block_size ({semantics.block_size}): the "
            "file is damaged; choose another."
        )
    return semantics


def _read_corpora(tables: Any, place: str) -> tuple[CorpusRecord, ...]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{place}corpora ({tables!r}) must be a list of objects: the file is damaged; choose another.")
    return tuple(read_fields(CorpusRecord, table, f"{place}corpora.{number}.") for number, table in enumerate(tables))


def _read_sft(table: Any, place: str) -> Mapping[str, Any] | None:
    if table is not None and not isinstance(table, dict):
        raise ValueError(f"{place}sft ({table!r}) must be an object: the file is damaged; choose another.")
    return table


def _read_part(kind: type[T], content: Mapping[str, Any], place: str) -> T:
    """A part whose fields stand beside others in the file's outermost object."""
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    return read_fields(kind, {name: value for name, value in content.items() if name in names}, place)


def write_meta(folder: Path, meta: CheckpointMeta) -> None:
    """Write contract.json. What a tool's checkpoint does not have (a layout) is left out."""
    provenance = {name: value for name, value in asdict(meta.provenance).items() if value is not None}
    content = {
        "format": FORMAT,
        "model": dict(meta.model),
        "contract": asdict(meta.semantics),
        **asdict(meta.position),
        **provenance,
        **({"corpora": [asdict(corpus) for corpus in meta.corpora]} if meta.corpora else {}),
        **({} if meta.sft is None else {"sft": dict(meta.sft)}),
    }
    write_json(folder / CONTRACT, content, sort_keys=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Read state.json, where the run continues; its fields are those of training's RunState.

    Raises:
        ValueError: it is missing or damaged.
    """
    state = read_json(folder / STATE)
    for name in ("step", "optimizer_step", "consumed_tokens"):
        if type(state.get(name)) is not int:
            raise ValueError(
                f"{folder / STATE} is damaged: {name} ({state.get(name)!r}) must be of type int; "
                "choose another checkpoint."
            )
    return state

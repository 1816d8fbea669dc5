"""contract.json as a value: what is written is read, and what cannot be read is named."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_dllm.checkpoint.manifest import read_json
from megatron_dllm.checkpoint.meta import (
    CheckpointMeta,
    CorpusRecord,
    Position,
    Provenance,
    Semantics,
    read_meta,
    read_state,
    write_meta,
)
from megatron_dllm.run.names import CONTRACT, STATE
from tests.golden.earlier_run import CHECKPOINT, FOLDER
from tests.unit.checkpoint.small_checkpoint import MODEL, make_checkpoint

META = CheckpointMeta(
    asdict(MODEL),
    Semantics(shift=False, block_origin="row", mask_token_id=2, block_size=32, context_length=64),
    Position(step=7, consumed_tokens=700, stage="stable", is_stage_end=True, is_validated=True, save_number=3),
    Provenance(
        layout={"precision": "bf16", "tensor_model_parallel_size": 2},
        world_size=4,
        tokenizer="../../tokenizer",
        source="/models/base",
    ),
    (CorpusRecord("web", "0123", 0.75, 1000), CorpusRecord("chat", "4567", 0.25, 100, "89ab")),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    converted = replace(META, position=Position(), provenance=Provenance(), corpora=())
    causal = replace(META, semantics=replace(META.semantics, clean_block_size=1))
    for meta in (META, causal, converted):
        write_meta(tmp_path, meta)
        assert read_meta(tmp_path) == meta
    assert not {"layout", "corpora"} & set(read_json(tmp_path / CONTRACT))
    assert (META.is_diffusion, META.provenance.precision, converted.provenance.precision) == (True, "bf16", None)


def test_the_file_reads_as_earlier_versions_wrote_it() -> None:
    """Fields in the places where they stood before the reader was typed."""
    meta = read_meta(FOLDER / CHECKPOINT)
    content = json.loads((FOLDER / CHECKPOINT / CONTRACT).read_text())
    assert meta.model == content["model"]
    assert asdict(meta.semantics) == {"clean_block_size": None} | content["contract"]
    flat = {**asdict(meta.position), **asdict(meta.provenance)}
    assert {"format", "model", "contract", *flat} == set(content)
    assert {name: content[name] for name in flat} == flat


def _change(folder: Path, part: str | None, **changes: Any) -> None:
    content = read_json(folder / CONTRACT)
    target = content if part is None else content[part]
    for name, value in changes.items():
        if value is ...:
            del target[name]
        else:
            target[name] = value
    (folder / CONTRACT).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("contract", {"shift": "no"}, r"contract\.shift \('no'\) must be of type bool"),
        ("contract", {"shift": ...}, r"contract\.shift \(None\) must be of type bool"),
        ("contract", {"block_size": True}, r"contract\.block_size \(True\) must be of type int"),
        ("contract", {"colour": "red"}, r"contract\.colour is not known to this version"),
        (None, {"step": "7"}, r"contract\.json: step \('7'\) must be of type int"),
        (None, {"stage": 3}, r"contract\.json: stage \(3\) must be of type str | None"),
        (None, {"layout": [1]}, r"layout \(\[1\]\) must be of type Mapping"),
        (None, {"contract": 5}, r"is damaged \(no object contract\)"),
        (None, {"corpora": 5}, r"corpora \(5\) must be a list of objects"),
        (None, {"corpora": [{"name": "web"}]}, r"corpora\.0\.fingerprint \(None\) must be of type str"),
        (None, {"model": ...}, r"is damaged \(no object model\)"),
    ],
)
def test_another_shape_is_named(tmp_path: Path, part: str | None, change: dict[str, Any], message: str) -> None:
    write_meta(tmp_path, META)
    _change(tmp_path, part, **change)
    with pytest.raises(ValueError, match=message):
        read_meta(tmp_path)


def test_a_position_that_an_earlier_version_did_not_write_has_its_default(tmp_path: Path) -> None:
    write_meta(tmp_path, META)
    _change(tmp_path, None, is_validated=..., save_number=..., notes="by hand")
    assert read_meta(tmp_path) == replace(META, position=replace(META.position, is_validated=False, save_number=None))


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    stored = read_json(folder / CONTRACT)
    (folder / CONTRACT).write_text(json.dumps({**stored, "format": 99}))
    with pytest.raises(ValueError, match=r"format \(99\) is not 1"):
        read_meta(folder)


def test_damaged_json_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    (folder / CONTRACT).write_text('{"format": 1,')
    with pytest.raises(ValueError, match=r"contract.json is damaged .* choose another checkpoint"):
        read_meta(folder)


@pytest.mark.parametrize("content", ["{}", '{"step": 1, "optimizer_step": "1", "consumed_tokens": 5}'])
def test_a_state_without_its_position_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE).write_text('{"step": 1, "optimizer_step": 1, "consumed_tokens": 5}')
    assert read_state(tmp_path)["consumed_tokens"] == 5
    (tmp_path / STATE).write_text(content)
    with pytest.raises(ValueError, match=r"state\.json is damaged: .* must be of type int"):
        read_state(tmp_path)

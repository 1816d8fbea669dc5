"""The model of a checkpoint, whoever wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_dllm.checkpoint.identity import check_identity
from megatron_dllm.checkpoint.stored_model import read_stored_model
from megatron_dllm.run.names import CONTRACT
from tests.golden.earlier_run import CHECKPOINT, FOLDER, SMALL
from tests.unit.checkpoint.small_checkpoint import MODEL, make_checkpoint


def test_training_settings_that_earlier_versions_stored_are_passed_over() -> None:
    stored = read_stored_model(FOLDER / CHECKPOINT)
    assert {"attention_backend", "mask_embedding_noise", "moe_router_bias_update_rate"} <= stored.meta.model.keys()
    assert stored.model == SMALL
    assert check_identity(FOLDER / CHECKPOINT, SMALL) == stored.meta


def test_what_is_written_now_holds_the_model_alone(tmp_path: Path) -> None:
    stored = read_stored_model(make_checkpoint(tmp_path, 1))
    assert stored.model == MODEL
    assert stored.meta.model.keys() == asdict(MODEL).keys()
    assert not [name for name in stored.meta.model if name.startswith("mask_embedding") or "coeff" in name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, r"contract\.json: model\.colour is not known to this version"),
        ({"num_layers": "2"}, r"model\.num_layers \('2'\) must be of type int"),
        ({"rotary_base": True}, r"model\.rotary_base \(True\) must be of type float"),
        ({"num_layers": 10**9}, r"contract\.json: model\.num_layers \(1000000000\) must not exceed 1024"),
    ],
)
def test_a_model_of_another_shape_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = make_checkpoint(tmp_path, 1) / CONTRACT
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "model": {**content["model"], **change}}))
    with pytest.raises(ValueError, match=message):
        read_stored_model(path.parent)


def test_numbers_of_a_float_field_may_be_whole(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1) / CONTRACT
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "model": {**content["model"], "rotary_base": 10000}}))
    assert read_stored_model(path.parent).model == replace(MODEL, rotary_base=10000)

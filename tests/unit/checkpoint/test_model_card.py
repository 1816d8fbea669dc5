"""README.md of an export: true of the weights, and free of the places they lay in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dllm.checkpoint.meta import CheckpointMeta, Position, Provenance, Semantics
from megatron_dllm.checkpoint.model_card import model_card
from megatron_dllm.checkpoint.stored_model import StoredModel
from tests.tiny_models import MODELS

DIFFUSION = Semantics(shift=False, block_origin="document", mask_token_id=2, block_size=8, context_length=64)
CONVERTED = Position()
AUTOREGRESSIVE = replace(DIFFUSION, shift=True, block_size=1)


def card_of(folder: Path, architecture: str, semantics: Semantics = DIFFUSION, position: Position = CONVERTED) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    meta = CheckpointMeta({}, semantics, position, Provenance(source=str(folder.parent / "Ling-mini")))
    model = next(model for model in MODELS.values() if model.family == architecture)
    return model_card(StoredModel(folder, model, meta), architecture, "bfloat16", folder)


def rows_of(card: str) -> dict[str, str]:
    return dict(
        line.strip("| ").split(" | ", 1) for line in card.splitlines() if line.startswith("| ") and "| |" not in line
    )


def test_a_run_is_named_without_its_place(tmp_path: Path) -> None:
    (tmp_path / "decay").mkdir()
    (tmp_path / "decay" / "config.yaml").write_text("")
    position = Position(step=40, consumed_tokens=5000, stage="stable")
    card = card_of(tmp_path / "decay" / "checkpoints" / "step_0000040", "llada2_moe", position=position)
    assert str(tmp_path) not in card and "# decay" in card
    rows = rows_of(card)
    expected = {
        "Checkpoint": "decay/step_0000040",
        "Recipe": "decay/config.yaml",
        "Converted from": "Ling-mini",
        "Stage": "stable",
        "Optimizer steps of the run": "40",
        "Document tokens of the run": "5000",
        "Block size": "8",
        "Weights": "bfloat16, expert_bias float32",
    }
    assert {name: rows[name] for name in expected} == expected


def test_a_conversion_claims_no_training(tmp_path: Path) -> None:
    rows = rows_of(card_of(tmp_path / "mcore", "qwen3", AUTOREGRESSIVE))
    assert not [name for name in rows if name.startswith(("Stage", "Optimizer", "Document"))]
    assert rows["Prediction"] == "position i predicts token i + 1" and "Mask token id" not in rows


def test_weights_that_predict_the_next_token_say_so_under_a_diffusion_class(tmp_path: Path) -> None:
    rows = rows_of(card_of(tmp_path / "mcore", "llada2_moe", AUTOREGRESSIVE))
    assert "have not learnt yet" in rows["Prediction"]


@pytest.mark.parametrize("has_template", [True, False])
def test_the_usage_is_that_of_the_tokenizer(has_template: bool, tmp_path: Path) -> None:
    (tmp_path / "mcore").mkdir()
    template = {"chat_template": "{{ messages }}"} if has_template else {}
    (tmp_path / "mcore" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "x"} | template))
    assert ("apply_chat_template" in card_of(tmp_path / "mcore", "sdar")) == has_template


def test_a_merge_names_its_checkpoints_by_run_and_step(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    inputs = [
        {"checkpoint": str(tmp_path / "run" / "checkpoints" / f"step_000000{step}"), "weight": 0.5, "elbo": elbo}
        for step, elbo in ((1, 2.5), (2, None))
    ]
    (folder / "provenance.json").write_text(json.dumps({"weights": "uniform", "inputs": inputs}))
    card = card_of(folder, "llada2_moe", position=Position(step=2))
    assert "| run/step_0000001 | 0.5000 | 2.5000 |" in card and "| run/step_0000002 | 0.5000 |  |" in card
    assert str(tmp_path) not in card
    assert rows_of(card)["Optimizer steps of the run (of the newest that went into the merge)"] == "2"

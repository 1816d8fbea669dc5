"""What parts of a layer keep, by hand."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.finer_recomputation import rows_of, saved
from tests.unit.config.configs import model_config

# Two experts of 16 features for each token, a shared one of 24; 2 bytes a number.
MODEL = model_config(hidden_size=64, moe_router_topk=2, moe_ffn_hidden_size=16, moe_shared_expert_intermediate_size=24)


def test_parts_are_counted_by_hand() -> None:
    parts = saved(MODEL)
    assert parts["the two norms"] == 2 * 2 * 64
    assert parts["the experts' activation"] == 2 * 2 * 16
    assert parts["the shared expert"] == 3 * 2 * 24
    assert parts["the layer (full)"] == parts["kept"] - 2 * 64


def test_a_wider_shared_expert_keeps_as_much_more() -> None:
    more, less = saved(replace(MODEL, moe_shared_expert_intermediate_size=48)), saved(MODEL)
    grown = more["the shared expert"] - less["the shared expert"]
    assert grown > 0
    assert more["kept"] - less["kept"] == grown == more["the whole expert layer"] - less["the whole expert layer"]


def test_parts_are_rows_and_models_columns() -> None:
    rows = rows_of({"one": MODEL, "other": replace(MODEL, hidden_size=128)})
    assert rows[1] == {"computed again": "the two norms", "one": "0.3", "other": "0.5"}

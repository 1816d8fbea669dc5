"""The cost of methods: every one is a run of so many steps, and a table by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.methods_cost import Cost, cost_of, cost_run, main, rows_of
from benchmarks.methods_study import METHODS
from megatron_dllm.diffusion.block_schedule import max_batch_tokens


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_run_of_so_many_steps(name: str, tmp_path: Path) -> None:
    config = cost_run(tmp_path, name, 3)
    config.validate(1)
    assert config.data.validation is None and len(config.schedule.stages) == len(METHODS[name].blocks)
    for stage in config.schedule.stages.values():
        assert stage.num_tokens == 3 * max_batch_tokens(stage, config.schedule.tokens_per_row, has_prompts=False)
        assert stage.attention_anneal is None or stage.attention_anneal.steps == 3


def _step(stage: str, tokens: int, computed: int, seconds: float) -> dict[str, object]:
    return {
        "stage": stage,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "forward_tokens_per_second": computed / seconds,
    }


def test_a_cost_by_hand() -> None:
    """Medians without the first step of a stage; stages count by their share of the tokens, not of the records."""
    one = [_step("one", 10, 20, 90.0), _step("one", 10, 20, 1.0), _step("one", 10, 20, 2.0), _step("one", 10, 20, 60.0)]
    two = [_step("two", 20, 20, 70.0), _step("two", 20, 20, 8.0)]
    found = cost_of([*one, {"validation": "1"}, *two], {"one": 300.0, "two": 100.0}, 5.0)
    assert found == Cost(pytest.approx(0.75 * 2.0 + 0.25), pytest.approx(0.75 * 0.2 + 0.25 * 0.4), 5.0)


def test_the_table_says_how_many_times_the_reference_a_method_costs() -> None:
    first, second = rows_of({"wsd": Cost(1.5, 0.002, 4e6), "jump": Cost(1.875, 0.001, 5e6)})
    assert list(first.values()) == ["wsd", "1.50", "1.00", "2.000", "1.00", "1.00"]
    assert list(second.values()) == ["jump", "1.88", "1.25", "1.000", "0.50", "1.25"]


@pytest.mark.parametrize(("words", "message"), [(["--steps", "1"], r"steps \(1\)"), (["--rows", "0"], r"rows \(0\)")])
def test_numbers_that_no_run_could_have_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main(["--output", str(tmp_path / "table"), *words])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_methods_are_measured_beside_the_reference(tmp_path: Path) -> None:
    words = ["--methods", "growth, clean blocks of 1, AR loss", "--steps", "2", "--rows", "1"]
    assert main([*words, "--output", str(tmp_path / "table")]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["methods"]
    assert [row["method"] for row in rows] == ["wsd", "growth, clean blocks of 1, AR loss"]
    model_tokens = [float(row["model tokens"]) for row in rows]
    # Of WSD three tenths are whole contexts; a clean half that predicts is one token shorter than the document.
    assert 1.4 < model_tokens[0] < model_tokens[1] <= 2.0
    assert all(float(row["ms a token"]) > 0.0 for row in rows)

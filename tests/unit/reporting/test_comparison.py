"""Checkpoints beside one another: where results are found, what the table says, what is not the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dllm.checkpoint.validation import Validation, write_validation_file
from megatron_dllm.reporting.comparison import (
    differences,
    find_results,
    lines_of,
    models_of_chain,
    read_models,
    to_json,
)
from megatron_dllm.reporting.history import read_history
from megatron_dllm.reporting.page import page
from tests.unit.evaluation.made_results import write_harness
from tests.unit.reporting.folders import write_chain

AR = {"block_size": None, "likelihood": "exact, autoregressive", "weights": "base_hf"}


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three runs, and results of a base, of a checkpoint of one of them, and of an export."""
    chain = write_chain(tmp_path / "full")
    write_harness(chain / "base_hf" / "harness.json", acc=0.4, settings=AR)
    write_harness(chain / "decay" / "checkpoints" / "step_0000008" / "harness.json", acc=0.6)
    write_harness(chain / "harness_cap.json", acc=0.55, settings={"num_fewshot": 0})
    write_validation_file(chain / "base_hf" / "validation.json", Validation({"ar": 3.25}, {"ar": 1.5}, 0))
    return chain


def test_results_are_found_in_weights_runs_and_chains(chain: Path) -> None:
    assert {name: path.relative_to(chain).as_posix() for name, path in find_results(chain).items()} == {
        "cap": "harness_cap.json",
        "base_hf": "base_hf/harness.json",
        "decay step_0000008": "decay/checkpoints/step_0000008/harness.json",
    }
    assert list(find_results(chain / "decay")) == ["decay step_0000008"]
    assert list(find_results(chain / "base_hf")) == ["base_hf"]


def test_a_place_with_an_equal_sign_is_no_name(tmp_path: Path) -> None:
    write_harness(tmp_path / "lr=1e-4" / "harness.json", acc=0.4)
    assert [model.name for model in read_models([str(tmp_path / "lr=1e-4")])] == ["lr=1e-4"]
    assert [model.name for model in read_models([f"low={tmp_path / 'lr=1e-4'}"])] == ["low"]


def test_the_table_has_a_column_for_each_model(chain: Path) -> None:
    models = read_models([f"base={chain / 'base_hf'}", str(chain / "decay"), f"CAP={chain / 'harness_cap.json'}"])
    assert [model.name for model in models] == ["base", "decay step_0000008", "CAP"]
    lines = {line.measure: line.cells for line in lines_of(models)}
    assert lines["likelihoods are"] == ["exact NLL", "ELBO, block 32", "ELBO, block 32"]
    assert lines["quiz: acc"] == ["0.4 ± 0.1, 3 unsure", "0.6 ± 0.1, 3 unsure", "0.55 ± 0.1, 3 unsure"]
    assert lines["sums: exact_match, strict-match"] == ["0.75"] * 3
    assert lines["validation: nats/token"] == ["3.2500", "", ""]
    assert differences(models) == ["num_fewshot: base 5, decay step_0000008 5, CAP 0"]
    written = to_json(models)
    assert written["models"][0]["metrics"][0] == {"task": "quiz", "name": "acc", "value": 0.4, "error": 0.1}
    assert written["models"][0]["validation"]["nats_per_token"] == {"ar": 3.25}


def test_the_page_of_a_chain_shows_them_in_the_order_of_its_runs(chain: Path) -> None:
    history = read_history(chain)
    assert [model.name for model in models_of_chain(history)] == ["cap", "base_hf", "decay step_0000008"]
    text = page(history, [])
    assert "<h2>Tasks</h2>" in text and "<td>0.6 ± 0.1, 3 unsure</td>" in text
    assert "Not the same for all: num_fewshot: cap 0, base_hf 5, decay step_0000008 5." in text
    (chain / "harness_cap.json").unlink()
    (chain / "base_hf" / "harness.json").unlink()
    (chain / "decay" / "checkpoints" / "step_0000008" / "harness.json").unlink()
    assert "<h2>Tasks</h2>" not in page(read_history(chain), [])


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["{chain}/warmup"], "warmup holds no harness.json; ask its model some tasks"),
        (["{chain}/nowhere"], "nowhere holds no harness.json"),
        (["x={chain}"], "holds results of cap, base_hf, decay step_0000008; name the file of one of them"),
        (["{chain}/base_hf", "{chain}"], "two models are called base_hf; give them names"),
    ],
)
def test_what_cannot_be_compared_is_refused(places: list[str], message: str, chain: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_models([place.format(chain=chain) for place in places])


def test_two_results_of_one_name_are_refused(chain: Path) -> None:
    (chain / "harness_base_hf.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="are both called base_hf; name one of them"):
        find_results(chain)

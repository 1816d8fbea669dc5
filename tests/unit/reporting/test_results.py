"""The table names every model that was measured, with what it was measured by."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dllm.checkpoint.validation import Validation, write_validation
from megatron_dllm.reporting.history import read_history
from megatron_dllm.reporting.results import results, target_size
from tests.unit.checkpoint.small_checkpoint import CONDITIONS, make_checkpoint
from tests.unit.reporting.folders import training_record, validation_record, write_chain, write_run


def ar_record(step: int, nats: float) -> dict[str, Any]:
    return {"step": step, "validation": True, "stage": "ar", "is_stage_end": True, "validation_elbo/ar": nats}


def test_a_chain_from_its_base_to_its_merge(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "full")
    write_run(chain / "base", [training_record(4), ar_record(4, 4.5), ar_record(8, 4.25)], time=1.6e9)
    (chain / "merged").mkdir()
    (chain / "merged" / "contract.json").write_text("{}")
    validation = {"elbo": {"32": 2.5, "4": 2.0}, "bits_per_byte": {}, "target_block_size": 32}
    (chain / "merged" / "validation.json").write_text(json.dumps(validation))
    found = [(line.name, line.measure, line.nats) for line in results(read_history(chain))]
    assert sorted(found) == sorted(
        [
            ("AR base", "exact NLL", 4.25),
            ("before training", "ELBO, block 32", 6.0),
            ("after warmup", "ELBO, block 32", 5.0),
            ("after stable", "ELBO, block 32", 4.0),
            ("after decay", "ELBO, block 32", 3.0),
            ("merged", "ELBO, block 32", 2.5),
        ]
    )
    assert found[-1][0] == "merged"


def test_what_was_measured_otherwise_says_so(tmp_path: Path) -> None:
    chain = tmp_path / "full"
    run = write_run(chain / "run", [training_record(4), validation_record(8, 3.0)])
    other = replace(CONDITIONS, num_tokens=7)
    for step, elbo, conditions in ((10, 1.0, other), (20, 2.0, CONDITIONS), (30, 3.0, CONDITIONS)):
        make_checkpoint(run / "checkpoints", step, elbo, conditions=conditions)
    for name, conditions in (("alike", CONDITIONS), ("unlike", other)):
        folder = make_checkpoint(chain / name, 1)
        write_validation(folder, Validation({"32": 0.5}, {}, 32, conditions))
        folder.rename(chain / f"merged_{name}")
    cells = {line.name: line.cells()[1:3] for line in results(read_history(chain))}
    assert cells["best checkpoint (step_0000020)"] == ["ELBO, block 32", "2.0000"]
    assert cells["merged_alike"] == ["ELBO, block 32", "0.5000"]
    assert cells["merged_unlike"] == ["ELBO, block 32 (num_tokens 7, not 100)", "0.5000"]


def test_a_conversion_may_begin_autoregressively(tmp_path: Path) -> None:
    end = {"validation_elbo/32": 3.0, "validation_elbo/4": 2.5, "stage": "decay", "is_stage_end": True, "step": 9}
    run = write_run(tmp_path / "run", [training_record(5), ar_record(5, 2.0), {"validation": True, **end}])
    (line,) = results(read_history(run))
    assert (line.name, line.measure, line.nats) == ("after decay", "ELBO, block 32", 3.0)
    assert line.cells() == ["after decay", "ELBO, block 32", "3.0000", "-"]
    assert math.isnan(line.bits)


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    for index, name in enumerate(("one", "two")):
        records = [training_record(4), validation_record(4, 3.0 + index), validation_record(6, 1.0, is_stage_end=False)]
        write_run(tmp_path / "sweep" / name, records, time=1.7e9 + index)
    found = [(line.name, line.nats, line.bits) for line in results(read_history(tmp_path / "sweep"))]
    assert found == [("one: after stable", 3.0, 1.5), ("two: after stable", 4.0, 2.0)]


def test_a_run_that_measured_nothing_has_no_results(tmp_path: Path) -> None:
    assert results(read_history(write_run(tmp_path / "run", [training_record(4)]))) == []
    assert target_size([]) is None

"""The study of an autoregressive clean half: arms that cost the same, and a table that compares equal seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ar_guided import num_seeds_of
from benchmarks.guided_runs import SIZES, TARGET, arm_tokens, arms, base_stages, operations, run_config
from benchmarks.guided_table import rows_of, write_study
from megatron_dllm.config import ParallelConfig
from megatron_dllm.planning.parameters import PipelineRank, rank_weights

WEIGHTS = [0.2, 0.5]


@pytest.mark.parametrize("size", list(SIZES))
def test_arms_take_equal_operations(size: str) -> None:
    model, found = SIZES[size], {}
    for name, arm in arms(WEIGHTS).items():
        stages = arm.stages(arm_tokens(model, arm, 400_000))
        found[name] = sum((stage.num_tokens or 0) * operations(model, stage) for stage in stages.values())
        config = run_config(Path("folder") / size, "name", model, 1, stages)
        config.validate(1)
        assert stages["last"].clean_grid == (TARGET if name == "block" or name.startswith("returned") else 1)
        assert bool(stages["last"].ar_weight) == name.startswith("guided")
    for name, cost in found.items():
        assert cost == pytest.approx(found["block"] * (0.5 if name.endswith("half") else 1.0), rel=1e-4), name
    run_config(Path("folder") / size, "base", model, 0, base_stages(1_000_000)).validate(1)


def test_the_second_size_is_three_times_the_first() -> None:
    rank = PipelineRank(0, 1, 3, True, True)
    tiny, triple = (rank_weights(SIZES[size], ParallelConfig(), rank).total for size in ("tiny", "triple"))
    assert triple / tiny == pytest.approx(3.0, rel=0.05)


def test_each_size_has_its_number_of_seeds() -> None:
    assert num_seeds_of(["triple"], None) == {"triple": 3}
    assert num_seeds_of(["triple", "tiny"], [1, 2]) == {"triple": 1, "tiny": 2}
    with pytest.raises(ValueError, match=r"seeds \(4\) must be one number .* sizes \(tiny triple\); give 2"):
        num_seeds_of(["tiny", "triple"], [4])
    with pytest.raises(ValueError, match=r"seeds \(0\)"):
        num_seeds_of(["tiny"], [0])


def _result(arm: str, seed: int, elbo: float) -> dict[str, Any]:
    costs = dict(document_tokens=100, operations=1e9, own_elbo=elbo, ar_nll=1.0, seconds=60.0)
    return {"size": "tiny", "arm": arm, "seed": seed, "elbo": elbo, "curve": [[0.0, 3.0], [1e9, elbo]], **costs}


def test_gains_are_of_equal_seeds(tmp_path: Path) -> None:
    results = [_result("block", 1, 2.0), _result("block", 2, 3.0), _result("guided 0.5", 2, 2.5)]
    rows = rows_of(results)
    assert [(row["arm"], row["seeds"], row["gain"]) for row in rows] == [("block", 2, ""), ("guided 0.5", 1, "0.5000")]
    assert rows[0]["ELBO"] == "2.5000 ± 0.7071"
    for number, result in enumerate(results):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    write_study(tmp_path.glob("*.json"), tmp_path / "out", {"command": "c"})
    assert "guided 0.5" in (tmp_path / "out.md").read_text() and (tmp_path / "out.png").read_bytes()[1:4] == b"PNG"

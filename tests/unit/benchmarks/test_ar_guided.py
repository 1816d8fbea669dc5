"""The study of an autoregressive clean half: arms that cost the same, the order of its jobs, and its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ar_guided import jobs_of, main, num_seeds_of, validate
from benchmarks.guided_runs import SIZES, TARGET, arm_run, arms, base_stages, run_config
from benchmarks.guided_table import rows_of, write_study
from benchmarks.step_cases import count_pairs, needed_flops
from benchmarks.study_answers import fine_tuning
from benchmarks.study_corpus import write_corpora
from benchmarks.study_cost import mean_operations, operations
from benchmarks.study_jobs import RESULT, Job, Lengths, num_tokens, run_jobs
from megatron_dllm.config import ParallelConfig, TrainConfig
from megatron_dllm.planning.engine_rows import micro_batches
from megatron_dllm.planning.parameters import PipelineRank, rank_weights
from tests.unit.benchmarks.refusals import assert_refused

WEIGHTS = [0.5, 0.2]


def _runs(size: str, num_tokens: int = 400_000) -> dict[str, TrainConfig]:
    return {
        name: arm_run(Path("folder") / size, "name", SIZES[size], arm, 1, num_tokens, 8)
        for name, arm in arms(WEIGHTS).items()
    }


@pytest.mark.parametrize("size", list(SIZES))
def test_arms_take_equal_operations(size: str) -> None:
    found = {}
    for name, config in _runs(size).items():
        config.validate(1)
        fine_tuning(config, 400_000).validate(1)
        found[name] = num_tokens(config) * mean_operations(config)
        last = config.schedule.stages["last"]
        assert last.clean_grid == (TARGET if name == "block" or name.startswith("returned") else 1)
        assert bool(last.ar_weight) == name.startswith("guided")
    for name, cost in found.items():
        assert cost == pytest.approx(found["block"] * (0.5 if name.endswith("half") else 1.0), rel=1e-4), name
    run_config(Path("folder") / size, "base", SIZES[size], 0, base_stages(1_000_000)).validate(1)


@pytest.mark.parametrize("stage", ["warmup_1", "last"])
def test_operations_are_those_of_products_and_visible_pairs_of_real_rows(stage: str) -> None:
    """Counted on the rows that the stages of three arms would train on, and compared with the report's mask."""
    expected, found = {}, {}
    for name in ("block", "causal", "guided 0.5"):
        run = _runs("tiny")[name]
        (batch,) = micro_batches(run, run.schedule.stages[stage], 1)
        # The head forms its logits twice, and attention its weights in the backward pass: half of its forward pass.
        again = 2 * run.model.hidden_size * run.model.vocab_size * len(batch.target_ids)
        heads = run.model.num_attention_heads * run.model.kv_channels
        pairs = (run.model.num_layers - 1) * count_pairs(batch) + count_pairs(batch, targets_only=True)
        needed = needed_flops(run.model, batch) + again + 2 * heads * pairs
        expected[name] = needed / int(batch.num_document_tokens)
        found[name] = operations(run)[stage]
    for name, cost in found.items():
        assert cost == pytest.approx(expected[name], rel=0.02), name
        assert cost / found["block"] == pytest.approx(expected[name] / expected["block"], rel=0.02), name
    assert expected["guided 0.5"] > 1.1 * expected["block"]


def test_a_seed_changes_order_and_noise_alone() -> None:
    one, two = (
        arm_run(Path("folder"), "name", SIZES["tiny"], arms(WEIGHTS)["block"], seed, 10**6, 8) for seed in (1, 2)
    )
    assert (one.run.seed, two.run.seed) == (1, 2)
    assert replace(one, run=two.run) == two and replace(one.run, seed=2) == two.run


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


def test_what_decides_the_claim_runs_first_and_seed_by_seed(tmp_path: Path) -> None:
    jobs = list(jobs_of(tmp_path, "tiny", 2, WEIGHTS, Lengths(400_000, 10**6, 8)))
    names = [job.name for job in jobs]
    assert len({job.result for job in jobs}) == len(jobs)
    first = ["block", "returned 0.5, half", "returned 0.5", "guided 0.5", "causal"]
    expected = [f"tiny, seed {seed}, {name}" for seed in (1, 2) for name in first]
    expected += [f"tiny, seed {seed}, {name.replace('0.5', '0.2')}" for seed in (1, 2) for name in first[2:4]]
    assert names == ["tiny, AR model", *expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "5000"], r"tokens \(5000\) must be at least \d{5}, so that the shortest stage"),
        (["--base_tokens", "0"], r"base_tokens \(0\) must be at least 2048"),
        (["--rows", "0"], r"rows \(0\) must be positive"),
        (["--weights", "-1"], r"ar_weight \(-1.0\)"),
    ],
)
def test_what_no_run_could_do_is_refused_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path
) -> None:
    assert_refused(main, words, message, tmp_path)


def _result(arm: str, seed: int, elbo: float) -> dict[str, Any]:
    costs = dict(document_tokens=100, conversion_operations=1e9, own_elbo=elbo, ar_nll=1.0, seconds=60.0)
    costs |= dict(accuracy=0.5, tokens_per_forward=2.0)
    return {"size": "tiny", "arm": arm, "seed": seed, "elbo": elbo, "curve": [[0.0, 3.0], [1e9, elbo]], **costs}


def test_gains_are_of_equal_seeds(tmp_path: Path) -> None:
    results = [_result("block", 1, 2.0), _result("block", 2, 3.0), _result("guided 0.5", 2, 2.5)]
    rows = rows_of(results)
    assert [(row["arm"], row["seeds"], row["gain"]) for row in rows] == [("block", 2, ""), ("guided 0.5", 1, "0.5000")]
    assert rows[0]["ELBO"] == "2.5000 ± 0.7071" and rows[0]["tokens per forward"] == "2.00 ± 0.00"
    write_study(tmp_path.glob("*.json"), tmp_path / "out", {"command": "c"})
    assert not list(tmp_path.iterdir())  # nothing has been measured
    for number, result in enumerate(results):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    write_study(tmp_path.glob("*.json"), tmp_path / "out", {"command": "c"})
    assert "guided 0.5" in (tmp_path / "out.md").read_text() and (tmp_path / "out.png").read_bytes()[1:4] == b"PNG"


def test_a_study_whose_runs_are_all_there_writes_its_table_once(tmp_path: Path) -> None:
    written: list[str] = []
    jobs = [Job(name, tmp_path / name, 1e9, lambda: {"a": 1}) for name in ("one", "two")]
    for expected in (2, 3):  # a table after each run, then one where there is nothing to run
        run_jobs(jobs, lambda: written.append("table"))
        assert len(written) == expected


@pytest.mark.slow
def test_arms_are_measured_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two arms in steps of a row; clean blocks of one are measured under both masks."""
    study, output = tmp_path / "study", tmp_path / "table"
    write_corpora(study, num_documents=200, max_bytes=150_000, num_chats=40, num_questions=2)
    lengths = Lengths(8000, 2000, rows=1)
    validate(["tiny"], [0.5], lengths)
    names = ("AR model", "seed 1, block", "seed 1, guided 0.5")
    jobs = [job for job in jobs_of(study, "tiny", 1, [0.5], lengths) if job.name.removeprefix("tiny, ") in names]

    def write() -> None:
        write_study(study.glob(f"*_{lengths.name}/*/{RESULT}"), output, {"command": "c"})

    run_jobs(jobs, write)
    found = [json.loads(job.result.read_text()) for job in jobs[1:]]
    block, guided = found
    assert (block["arm"], guided["arm"]) == ("block", "guided 0.5")
    assert block["elbo"] == block["own_elbo"] and guided["own_elbo"] != guided["elbo"]
    # Measured at the start and at the end of each stage; the base is the same.
    assert len(block["curve"]) == len(guided["curve"]) == 5 and block["curve"][0] == guided["curve"][0]
    assert guided["document_tokens"] < block["document_tokens"]
    assert guided["conversion_operations"] == pytest.approx(block["conversion_operations"], rel=1e-3)
    for result in found:
        assert 3.0 < result["ar_nll"] < 8.0 and result["tokens_per_forward"] > 0.0 and 0.0 <= result["accuracy"] <= 1.0
    written = output.with_suffix(".md").read_text()
    assert "block" in written and "guided 0.5" in written and output.with_suffix(".png").is_file()
    # An arm without a result goes on from what it has; the others are left alone.
    jobs[1].result.unlink()
    before = {job.result: job.result.stat().st_mtime_ns for job in jobs if job.is_done}
    capsys.readouterr()
    run_jobs(jobs, write)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    repeated = json.loads(jobs[1].result.read_text())
    assert {**repeated, "seconds": 0} == {**block, "seconds": 0}
    assert "3 jobs, 2 of them done" in capsys.readouterr().out

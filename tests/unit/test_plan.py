"""The command: a verdict on a recipe, what would be better, refusals in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_dllm.compose import RECIPES
from megatron_dllm.plan import compose_words, gpu_counts, main, read_config, run
from megatron_dllm.planning.run_plan import plan_run, setting_of
from megatron_dllm.planning.search import search
from megatron_dllm.planning.work import assumed_work
from tests.unit.planning.made_run import write_run

MINI = ["experiment=llada2_mini", "cluster=h100x8"]
# A layout whose experts lie on two nodes and that computes everything again.
_SLOW = dict(tensor_model_parallel_size=4, sequence_parallel="true", pipeline_model_parallel_size=4, recompute="full")
_FAR = dict(context_parallel_size=1, expert_model_parallel_size=16, expert_tensor_parallel_size=1)
FLASH = [
    *("experiment=llada2_flash", "cluster=h100x8", "nodes=8"),
    *(f"parallel.{key}={value}" for key, value in (_SLOW | _FAR).items()),
]
# Too small for anything.
TINY_GPU = "cluster.hardware.memory_gb=5"


def _peak(words: list[str]) -> int:
    config, _ = read_config(compose_words(words))
    setting = setting_of(config)
    return plan_run(config, setting, assumed_work(config, config.assumptions), config.num_gpus).peak


@pytest.mark.ranks
def test_a_verdict_names_the_tightest_rank_its_parts_and_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(FLASH) == 0
    text = capsys.readouterr().out
    assert "llada2_flash on 8 nodes of h100x8 (64 GPUs, 80 GB): fits, worst rank 37.5 of 77.6 GB" in text
    assert "pipeline rank 4 of 4, stage " in text
    for part in ("parameters", "weights", "gradients", "optimizer", "activations", "head", "reserve"):
        assert re.search(rf"^{part} .*(formula|assumed)", text, re.MULTILINE)
    for stage in ("warmup_1", "stable", "decay_32", "total"):
        assert re.search(rf"^{stage} ", text, re.MULTILINE)
    assert "rows: assumed: documents of 4,096 tokens" in text and "not calibrated" in text


@pytest.mark.ranks
def test_the_words_of_an_option_give_what_they_promise(capsys: pytest.CaptureFixture[str]) -> None:
    main(FLASH)
    text = capsys.readouterr().out
    options = dict(re.findall(r"^(faster|cheaper|smaller): (.*) \(.*; [\d.]+ GB\)$", text, re.MULTILINE))
    assert "faster" in options and "parallel.recompute=none" in options["faster"]
    for gain, words in options.items():
        (promised,) = re.findall(rf"^{gain}: .*; ([\d.]+) GB\)$", text, re.MULTILINE)
        assert _peak([*FLASH, *words.split()]) / 1e9 == pytest.approx(float(promised), abs=0.06)


@pytest.mark.ranks
def test_a_search_is_better_than_the_recipe_and_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*MINI, "parallel.recompute=full", "search=true", f"output={tmp_path / 'plan'}"])
    assert re.search(r"^search: \d{3} layouts tried, \d{3} fit$", capsys.readouterr().out, re.MULTILINE)
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())
    (best,) = found["options"]
    assert best["gain"] == "best for time" and best["hours"] < found["hours"]
    assert found["fits"] and found["peak_bytes"] == max(
        memory["total"] for stage in found["stages"] for memory in stage["memory_bytes"]
    )
    assert sum(stage["gpu_hours"] for stage in found["stages"]) == pytest.approx(found["gpu_hours"])
    assert (tmp_path / "plan" / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_engine_confirms_what_the_formula_says(capsys: pytest.CaptureFixture[str]) -> None:
    main(["experiment=llada2_mini", "model.num_layers=3", "confirm=true"])
    found = re.findall(
        r"^engine: pipeline rank 1, stage \w+: ([\d.]+) GB, fits \(formula ([\d.]+) GB, the same parameters\)$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    ((engine, formula),) = found
    assert float(formula) == pytest.approx(float(engine), rel=0.05)


def test_a_plan_that_does_not_fit_says_what_does() -> None:
    changed = {"nodes=8": "nodes=2", "parallel.expert_model_parallel_size=16": "parallel.expert_model_parallel_size=4"}
    words = [changed.get(word, word) for word in FLASH]
    with pytest.raises(
        ValueError, match=r"needs 128\.\d GB.*optimizer.*limit is 77\.6 GB; on 4 nodes this fits: "
    ) as caught:
        run(words)
    (remedy,) = re.findall(r"this fits: (.*) \([\d.]+ GB\)\.$", str(caught.value))
    others = [word for word in words if word != "nodes=2"]
    assert _peak([*others, *remedy.split()]) / 1e9 < 77.6


def test_a_model_that_fits_nowhere_is_told_the_least_it_needs() -> None:
    with pytest.raises(ValueError, match=r"nothing fits on up to \d+ nodes: the least .* GB, on \d+ GPUs with .*"):
        run([*MINI, TINY_GPU])


BAD = [
    (["cluster.hardware.memory=80"], "cluster.hardware.memory is not a key.*memory_gb"),
    (["cluster.hardware.memory_gb=-1"], "cluster.hardware.memory_gb .* must not be negative"),
    (["cluster=laptop"], r"cluster.hardware.memory_gb \(0\) must be known to plan"),
    (["cluster=h100"], "did you mean h100x8"),
    (["nodes=0"], r"nodes \(0\) must be positive"),
    (["nodes=100000"], r"nodes \(100000\) must have at most"),
    (["nodes=3"], r"global_batch_size \(512\) must be a multiple of data parallel size.*24.*use 504 or 528"),
    (["nodes=128"], r"global_batch_size \(512\).*1024.*use 1024"),
    (["parallel.tensor_model_parallel_size=3"], r"On 8 ranks this works"),
    (["objective=speed"], r"objective \(speed\) is not known"),
    (["max_gpus=64"], r"max_gpus \(64\) has an effect only with search=true"),
    (["max_gpus=4", "search=true"], r"max_gpus \(4\) must lie between a node's 8"),
    (["assumptions.product_efficiency=2"], r"assumptions.product_efficiency \(2.0\) must lie in \(0, 1\]"),
    (["assumptions.fp8_speedup=0"], r"assumptions.fp8_speedup \(0.0\) must be positive"),
    (["assumptions.expert_imbalance=0.5"], r"expert_imbalance \(0.5\) must be at least 1"),
    (["assumptions.interval_low=1.1"], "both sides of 1"),
    (["assumptions.host_ms_per_layer=-1"], "must not be negative"),
    (["assumptions.document_length=0"], r"document_length \(0\) must be positive"),
    (["search=true", "schedule.stages.stable.world_size=8"], "stages"),
    (["output=/"], r"output \(/\) exists"),
    (["confirm=true", "parallel.precision=fp8"], r"confirm \(true\) .* FP8 with TransformerEngine"),
    (["task=serve"], r"task \(serve\) is not known"),
    (["task=generate", "search=true"], r"task \(generate\) has no search"),
    (["task=generate", "texts.tokens_per_pass=64"], r"texts.tokens_per_pass \(64.0\) must lie between 1 and"),
    (["task=generate", "texts.batch_size=0"], r"texts.batch_size \(0\) must be positive"),
    (["task=generate", "texts.prompt_length=1000000"], r"texts.prompt_length .* must not exceed"),
    (["task=generate", "parallel.context_parallel_size=2"], r"context_parallel_size \(2\) must be 1"),
    (["task=generate", "nodes=3", "parallel.expert_model_parallel_size=16"], r"expert .* must divide the number of"),
    (["task=evaluate", "evaluation.block_sizes=[33]"], r"evaluation.block_sizes \(33\) must divide"),
    (["experiment=sft"], "checkpoint.load"),
    (["calibrate=[/nowhere]"], r"calibrate \(/nowhere\) must name folders of runs"),
    (["cluster=laptop", "calibrate=[/nowhere]"], r"cluster.hardware.memory_gb \(0\) must be known"),
]


@pytest.mark.ranks  # each composes all recipes
@pytest.mark.parametrize(("words", "says"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_a_wrong_value_ends_in_one_sentence(words: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        run([*MINI, *words])
    assert "\n" not in str(caught.value)


@pytest.mark.ranks
def test_decoding_is_planned_with_the_texts_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*MINI, "task=generate", "texts.tokens_per_pass=3"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "llada2_mini, generate, on 1 node of h100x8 (8 GPUs, 80 GB): fits" in text
    for part in ("weights", "cache", "activations", "logits", "reserve", "total"):
        assert re.search(rf"^{part} GB ", text, re.MULTILINE)
    ((number, rate),) = re.findall(r"with ([\d]+) texts at a time.*?([\d,]+) new tokens a second", text, re.DOTALL)
    assert int(number) > 100 and int(rate.replace(",", "")) > 1000
    main([*words, "texts.batch_size=16"])
    assert f"each with 16 texts at a time (at most {number} fit)" in capsys.readouterr().out


@pytest.mark.ranks
@pytest.mark.parametrize("task", ["generate", "evaluate"])
def test_a_model_too_large_for_a_gpu_is_told_the_layout_that_fits(task: str) -> None:
    words = ["experiment=llada2_flash", "cluster=h100x8", "parallel=single", "parallel.precision=bf16", f"task={task}"]
    with pytest.raises(
        ValueError, match=rf"needs 2\d\d\.\d GB on a GPU to {task}.*weights.*limit is 77\.6 GB"
    ) as caught:
        run(words)
    (remedy,) = re.findall(r"on these GPUs this fits: (.*)\.$", str(caught.value))
    assert run([*words, *remedy.split()]) == 0


@pytest.mark.ranks
def test_an_evaluation_takes_as_long_at_each_block_size(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*MINI, "task=evaluate", "evaluation.block_sizes=[32,4]", "evaluation.num_tokens=2000000"]
    assert main(words) == 0
    text = capsys.readouterr().out
    minutes = [float(value) for value in re.findall(r"^(?:32|4) +[\d,]+ +[\d.]+ +([\d.]+) ", text, re.MULTILINE)]
    assert len(minutes) == 2 and minutes[0] == pytest.approx(minutes[1], rel=0.3)
    assert "2,000,000 document tokens" in text


def test_calibration_ends_with_words_that_a_plan_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "mine")
    assert main(["cluster=h100x8", f"calibrate=[{tmp_path / 'mine'}]"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^mine one +3\.000 ", text, re.MULTILINE) and "left out" in text
    (words,) = re.findall(r"^plan with: (.*)$", text, re.MULTILINE)
    config, _ = read_config(compose_words([*MINI, *words.split()]))
    assert config.assumptions.calibrated_on == "mine"
    assert config.assumptions.host_ms_per_layer > 9.0, "steps of seconds for a tiny model"


def test_a_search_takes_numbers_of_nodes_that_halve_or_third() -> None:
    config, _ = read_config(compose_words([*MINI, "search=true", "max_gpus=100", "nodes=4"]))
    assert gpu_counts(config) == [8, 16, 24, 32, 48, 64, 96]


@pytest.mark.ranks
@pytest.mark.parametrize(("experiment", "nodes"), [("llada2_mini", 1), ("qwen3_30b_a3b", 2), ("llada2_flash", 8)])
def test_no_recipe_is_beaten_by_more_than_a_tenth(experiment: str, nodes: int) -> None:
    config, _ = read_config(compose_words([f"experiment={experiment}", "cluster=h100x8", f"nodes={nodes}"]))
    setting = setting_of(config)
    work = assumed_work(config, config.assumptions)
    plan = plan_run(config, setting, work, config.num_gpus)
    found = search(setting, config, work, [config.num_gpus], "time")
    assert found.best is not None and plan.fits and plan.hours < 1.1 * found.best.hours


CLUSTERS = [path.stem for path in sorted((RECIPES / "cluster").glob("*x8.yaml"))]


@pytest.mark.ranks
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize(("experiment", "nodes"), [("llada2_mini", 1), ("qwen3_30b_a3b", 2), ("llada2_flash", 8)])
def test_no_recipe_is_refused(cluster: str, experiment: str, nodes: int) -> None:
    words = [f"experiment={experiment}", f"cluster={cluster}", f"nodes={nodes}"]
    config, _ = read_config(compose_words(words))
    setting = setting_of(config)
    assert plan_run(config, setting, assumed_work(config, config.assumptions), config.num_gpus).fits

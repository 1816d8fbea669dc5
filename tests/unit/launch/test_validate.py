from __future__ import annotations

import logging
import os
import re
import shlex
import struct
from pathlib import Path

import pytest

from launch import submit
from launch.chain import compose_chain
from launch.submit import dependencies_of, readable_refusal
from launch.validate import check_chain, folder_problems, training_problems
from megatron_dllm.config.recipe_source import RECIPES

HEADER = struct.pack("<9sQB", b"MMIDIDX\x00\x00", 1, 4)


def corpus(prefix: Path, header: bytes = HEADER, description: str = "{}") -> None:
    prefix.with_suffix(".bin").write_bytes(b"tokens")
    prefix.with_suffix(".idx").write_bytes(header)
    prefix.with_suffix(".json").write_text(description)


def problems(root: Path, *words: str) -> list[str]:
    # Another train_module: what training itself would refuse is asked in a process of its own, and tried elsewhere.
    return check_chain(
        compose_chain(
            [
                "experiment=tiny_base",
                f"run.root={root}",
                "run.name=run",
                f"data.train={root}/train",
                f"data.validation={root}/validation",
                f"data.tokenizer={root}",
                "train_module=tests.slurm.fake_train",
                *words,
            ]
        )
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    corpus(tmp_path / "train")
    corpus(tmp_path / "validation")
    return tmp_path


def test_what_is_fine_passes(root: Path) -> None:
    assert problems(root) == []


def test_every_problem_is_shown_at_once(root: Path) -> None:
    (root / "train.idx").unlink()
    found = problems(
        root,
        "data.tokenizer=/nowhere",
        "checkpoint.load=/nowhere",
        "cluster.container.kind=apptainer",
        "cluster.container.image=/nowhere.sif",
        f"cluster.container.mounts=['/nowhere:/data','{root}:{root}']",
    )
    assert len(found) == 5
    for text in (
        "train.idx; tokenize the text",
        "data.tokenizer (/nowhere)",
        "holds no complete checkpoint",
        "image (/nowhere.sif) does not exist",
        "mounts (/nowhere:/data)",
    ):
        assert any(text in sentence for sentence in found), text


def test_a_corpus_must_be_one_and_fit_the_model(root: Path) -> None:
    corpus(root / "train", header=b"something else")
    corpus(root / "validation", description='{"max_token_id": 999999, "mask_token_id": 77}')
    found = problems(root)
    assert "is not a Megatron index" in found[0]
    assert "holds token 999999, which must lie below model.vocab_size" in found[1]
    assert "differs from the corpus" in found[2]


def test_a_damaged_description_of_a_corpus_is_named_among_the_others(root: Path) -> None:
    corpus(root / "train", description="{")
    corpus(root / "validation", header=b"something else")
    found = problems(root)
    assert len(found) == 2
    assert f"data.train ({root}/train): {root}/train.json is damaged" in found[0]


def test_a_folder_below_one_that_may_not_be_entered_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        (sentence,) = folder_problems(tmp_path / "closed" / "root" / "run")
    finally:
        os.seteuid(user)
    assert "cannot be written" in sentence and "Permission denied" in sentence


def test_a_folder_that_cannot_be_written_is_named(root: Path) -> None:
    found = problems(root, "run.root=/proc/nowhere")
    assert found and all("/proc/nowhere/run cannot be written" in sentence for sentence in found)


@pytest.mark.parametrize("name", ["%j", "a,b", "a:b"])
def test_a_folder_that_sbatch_or_a_container_would_misread_is_refused(root: Path, name: str) -> None:
    found = problems(root, f"run.root='{root}/{name}'")
    assert found and all("would misread" in sentence for sentence in found)


def test_scores_that_are_not_there_are_named(root: Path) -> None:
    words = [
        "experiment=tiny_dpo",
        f"run.root={root}",
        f"data.train={root}/train",
        "train_module=tests.slurm.fake_train",
    ]
    words.append(f"preference.reference={root}/pairs.scores")
    message = f"preference.reference ({root}/pairs.scores) is not a file; write it first"
    assert [sentence for sentence in check_chain(compose_chain(words)) if message in sentence]
    (root / "pairs.scores").touch()
    assert not [sentence for sentence in check_chain(compose_chain(words)) if "preference.reference" in sentence]


def test_what_a_container_does_not_show_is_named(root: Path) -> None:
    (root / "x.sif").touch()
    words = ["cluster.container.kind=apptainer", f"cluster.container.image={root}/x.sif", f"run.root={root}/runs"]
    found = problems(root, *words)
    assert len(found) == 3 and all("lies under no mount of the container" in sentence for sentence in found)
    assert f"data.train ({root}/train)" in found[0] and f"add {root}:{root} to cluster.container.mounts" in found[0]
    assert problems(root, *words, f"cluster.container.mounts=['{root}:{root}:ro']") == []


def test_a_tool_s_module_and_inputs_must_be_there(recipes: Path, tmp_path: Path) -> None:
    text = """# @package _global_
name: tools
jobs:
  weights: {module: checkpoints_tools.hf_to_mcor, arguments: [--hf, /nowhere/hf, --output, "${root}/start"]}
  merge: {module: nosuch.merge, arguments: [--checkpoints, "${root}/start", /nowhere/b, --output, "${root}/merged"]}
  measure: {module: megatron_dllm.evaluate, arguments: ["checkpoint.load=${root}/merged", data.validation=/nowhere/v]}
"""
    (recipes / "chain" / "tools.yaml").write_text(text)
    found = check_chain(compose_chain(["experiment=tools", f"root={tmp_path}"], recipes))
    for expected in (
        "did you mean checkpoints_tools.hf_to_mcore?",
        "--hf (/nowhere/hf) does not exist",
        "module (nosuch.merge) does not exist; correct its name",
        "--checkpoints (/nowhere/b) does not",
        "job measure: data.validation (/nowhere/v) does not exist",
    ):
        assert any(expected in sentence for sentence in found), expected
    assert len(found) == 5


@pytest.mark.ranks
def test_training_is_asked_by_an_interpreter_that_has_it(root: Path, tmp_path: Path) -> None:
    """The nodes' own Python, which starts the container, need not have torch."""
    for name, text in (("bare", "echo No torch >&2; exit 1"), ("full", "echo train: no corpus; exit 2")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (job,) = compose_chain(["experiment=tiny_base"]).jobs
    bare, full = str(tmp_path / "bare"), str(tmp_path / "full")
    assert training_problems([job], [], [bare]) == []
    assert training_problems([job], [], [bare, full]) == ["job train: no corpus"]


def test_what_an_earlier_job_makes_is_not_missing(recipes: Path, tmp_path: Path) -> None:
    text = """# @package _global_
name: made
train_module: tests.slurm.fake_train
jobs:
  corpus: {module: platform, arguments: [--output, "${root}/made/text", --x], output: "${root}/made/text.json"}
  base:
    experiment: tiny_base
    overrides: ["data.train=${root}/made/text", data.validation=null, data.tokenizer=null, evaluation.num_tokens=0]
  tune:
    experiment: tiny_base
    overrides: ["data.train=${root}/made/other", "checkpoint.load=${root}/made/base", data.validation=null,
                data.tokenizer=null, evaluation.num_tokens=0]
"""
    (recipes / "chain" / "made.yaml").write_text(text)
    (sentence,) = check_chain(compose_chain(["experiment=made", f"root={tmp_path}"], recipes))
    assert sentence.startswith("job tune: data.train") and "made/other.bin" in sentence


def test_a_job_waits_for_the_unfinished_jobs_before_it(recipes: Path) -> None:
    chain = compose_chain(["experiment=three"], recipes)
    convert = chain.jobs[2]
    assert dependencies_of(chain, convert, {"first": "1", "base": "2"}) == ["2"]
    # base has finished before, but what it came after runs again.
    assert dependencies_of(chain, convert, {"first": "1"}) == ["1"]
    assert dependencies_of(chain, convert, {}) == []


def test_sbatch_s_refusal_is_readable() -> None:
    said = "sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition name specified\n"
    assert readable_refusal(said) == "invalid partition specified: x Invalid partition name specified"


@pytest.mark.parametrize("name", ["tiny_demo", "tiny_study", "tiny_sft_study"])
def test_the_project_s_own_chains_hang_together_in_any_folder(tmp_path: Path, name: str) -> None:
    chain = compose_chain([f"experiment={name}", f"root={tmp_path}", "train_module=tests.slurm.fake_train"])
    # The study starts from what the demo leaves behind, which need not be there.
    assert not [sentence for sentence in check_chain(chain) if "runs/demo" not in sentence]


@pytest.mark.parametrize("name", ["llada2_mini_full", "llada2_mini_chat", "llada2_mini_dpo"])
def test_the_whole_conversion_is_submitted_as_its_comment_says(tmp_path: Path, name: str) -> None:
    comment = (RECIPES / "chain" / f"{name}.yaml").read_text().split("#   ", 1)[1].split("\n# inputs")[0]
    words = shlex.split(re.sub(r"\\\n#", "", comment).replace("/data/", f"{tmp_path}/data/"))
    assert words[:2] == ["python", "launch/submit.py"]
    hf = tmp_path / "data" / "Ling-mini-base-2.0"
    hf.mkdir(parents=True)
    for prefix in ("text/train", "text/validation", "chats/train", "pairs/train"):
        (tmp_path / "data" / prefix).parent.mkdir(exist_ok=True)
        corpus(tmp_path / "data" / prefix)
    words = [*words[2:], f"root={tmp_path}/runs", "train_module=tests.slurm.fake_train"]
    chain = compose_chain(words)
    assert check_chain(chain) == []
    assert chain.jobs[0].arguments[2:6] == ("--hf", str(hf), "--tokenizer", str(hf))
    (tmp_path / "llada2").mkdir()
    chain = compose_chain([*words, f"inputs.tokenizer={tmp_path}/llada2"])
    assert check_chain(chain) == []
    assert chain.jobs[0].arguments[4:6] == ("--tokenizer", f"{tmp_path}/llada2")
    sentences = check_chain(compose_chain([*words, f"inputs.tokenizer={tmp_path}/none"]))
    assert len(sentences) == 1 and "--tokenizer" in sentences[0] and "does not exist" in sentences[0]


GPUS = ("cluster.gpus_per_node=1", "cluster.hardware={bf16_tflops: 1, memory_gb_per_s: 1, node_gb_per_s: 1}")


def test_a_job_that_cannot_fit_is_refused_before_it_is_queued(root: Path) -> None:
    rates = "cluster.hardware.network_gb_per_s=1"
    (found,) = problems(root, *GPUS, rates, "cluster.hardware.memory_gb=4")
    says = r"job train: parallel needs 4\.\d GB on a GPU, .*the limit is 4\.0 GB; nothing fits on up to"
    assert re.match(says, found)
    assert problems(root, *GPUS, rates, "cluster.hardware.memory_gb=80") == []


def test_a_submission_that_cannot_fit_ends_with_the_layout_that_would(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model of 16 billion parameters on each GPU, where eight of them could share its experts."""
    words = ["experiment=llada2_mini", "cluster=h100x8", f"run.root={root}/runs", "train_module=tests.slurm.fake_train"]
    words += [f"data.{name}={root}/{name}" for name in ("train", "validation")]
    words += [f"data.tokenizer={root}", "parallel.expert_model_parallel_size=1"]
    with caplog.at_level(logging.ERROR, "launch"):
        assert submit.main(words) == 2
    found, count = caplog.messages
    says = r"job train: parallel needs \d+\.\d GB on a GPU, .*the limit is 80\.0 GB; on these GPUs this fits: (.*) \("
    fitting = re.match(says, found)
    assert fitting is not None and "\n" not in found and count == "nothing was submitted: 1 problem(s)"
    assert not (root / "runs").exists()
    assert check_chain(compose_chain([*words, *fitting[1].split()])) == []

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch.chain import compose_chain
from launch.job import sbatch_options, valid_nodes
from megatron_dllm.compose import compose_train_config
from megatron_dllm.config.recipe_source import RECIPES


def test_a_plain_experiment_is_a_chain_of_one_job() -> None:
    chain = compose_chain(["experiment=tiny_base", "run.name=mine", "run.root=/tmp/r", "nodes=3"])
    (job,) = chain.jobs
    assert chain.folder == Path("/tmp/r/mine") == job.run_folder
    assert job.is_training and job.spec.nodes == 3
    assert job.arguments == ("-m", "megatron_dllm.train")


def test_every_job_of_a_chain_has_its_own_folder_and_its_paths_filled_in(recipes: Path) -> None:
    chain = compose_chain(["experiment=three", "root=/tmp/r", "run.seed=5"], recipes)
    first, base, convert = chain.jobs
    assert first.spec.output == "/tmp/r/three/first.txt" and not first.is_training
    assert (base.run_folder, convert.run_folder) == (Path("/tmp/r/three/base"), Path("/tmp/r/three/convert"))
    assert convert.config is not None and convert.config.checkpoint.load == "/tmp/r/three/base"
    assert {job.config.run.seed for job in (base, convert) if job.config} == {5}
    assert base.after == ("first",) and convert.after == ("base",)


def test_the_frozen_configuration_composes_to_the_same_values(recipes: Path, tmp_path: Path) -> None:
    job = compose_chain(["experiment=three", "root=/tmp/r"], recipes).jobs[2]
    frozen = tmp_path / "frozen"
    frozen.mkdir()
    (frozen / "config.yaml").write_text(job.config_text)
    assert compose_train_config([], "config", frozen) == job.config
    assert "${" not in job.config_text
    assert yaml.safe_load(job.config_text)["hydra"]["run"]["dir"] == "."


def test_a_job_s_digest_follows_what_it_and_the_jobs_before_it_run(recipes: Path) -> None:
    def digests(*words: str) -> list[str]:
        return [job.digest for job in compose_chain(["experiment=three", *words], recipes).jobs]

    plain = digests()
    assert digests() == plain
    changed = digests("jobs.first.arguments=[--all]")
    assert all(a != b for a, b in zip(plain, changed, strict=True))
    changed = digests("jobs.convert.overrides=['run.seed=7']")
    assert plain[:2] == changed[:2] and plain[2] != changed[2]
    # Where and how fast it runs does not change what comes out.
    assert digests("cluster.partition=other", "jobs.convert.time_limit='01:00:00'") == plain


def test_runs_lie_where_the_cluster_keeps_them_unless_told_otherwise(recipes: Path) -> None:
    def folders(*words: str) -> list[str]:
        return [str(compose_chain(["cluster.run_root=/big", *words], recipes).folder)]

    assert folders("experiment=three") == ["/big/three"]
    assert folders("experiment=three", "root=/mine") == ["/mine/three"]
    assert folders("experiment=tiny_base") == ["/big/base"]
    assert folders("experiment=tiny_base", "run.root=/mine") == ["/mine/base"]
    assert folders("experiment=tiny_base", "cluster.run_root='/große'") == ["/große/base"]


def test_a_conversion_without_chats_is_the_beginning_of_the_one_with_them() -> None:
    words = ["cluster=h100x8", "name=mine", "inputs.hf=/data/hf", "inputs.train=/data/t", "inputs.validation=/data/v"]
    full = compose_chain(["experiment=llada2_mini_full", *words])
    chat = compose_chain(["experiment=llada2_mini_chat", *words, "inputs.chats=/data/c"])
    assert full.jobs[-1].name == "export" and full.jobs == chat.jobs[: len(full.jobs)]
    with pytest.raises(ValueError, match=r"inputs\.chats must be given"):
        compose_chain(["experiment=llada2_mini_chat", *words])


def test_a_conversion_with_preferences_goes_on_from_the_one_with_chats() -> None:
    words = ["cluster=h100x8", "name=mine", "root=/r", "inputs.hf=/d/hf", "inputs.train=/d/t", "inputs.validation=/d/v"]
    chat = compose_chain(["experiment=llada2_mini_chat", *words, "inputs.chats=/d/c"])
    whole = compose_chain(["experiment=llada2_mini_dpo", *words, "inputs.chats=/d/c", "inputs.pairs=/d/p"])
    assert whole.jobs[: len(chat.jobs)] == chat.jobs
    scores, dpo, export = whole.jobs[len(chat.jobs) :]
    assert [job.after for job in (scores, dpo, export)] == [("cap",), ("scores",), ("dpo",)]
    assert dpo.config is not None and dpo.config.preference.reference == scores.spec.output == "/r/mine/pairs.scores"
    # The scores are for the run that reads them: its words, but for the file and what names the run.
    own = [word for word in dpo.spec.overrides if not word.startswith("preference.reference=")]
    assert scores.spec.arguments == ["experiment=dpo", *own, f"scores={scores.spec.output}"]
    assert scores.spec.nodes * (scores.spec.ranks_per_node or 0) == dpo.spec.nodes * 8
    assert "/r/mine/dpo" in export.arguments and valid_nodes(whole, dpo) == [2]
    with pytest.raises(ValueError, match=r"inputs\.pairs must be given"):
        compose_chain(["experiment=llada2_mini_dpo", *words, "inputs.chats=/d/c"])


def test_the_whole_conversion_composes_and_its_stages_add_up() -> None:
    chain = compose_chain(
        [
            "experiment=llada2_mini_chat",
            "cluster=h100x8",
            "cluster.cpu_partition=cpu",
            "root=/r",
            "inputs.hf=/data/hf",
            "inputs.train=/data/t",
            "inputs.validation=/data/v",
            "inputs.chats=/data/c",
        ]
    )
    names = ["hf_to_mcore", "warmup", "stable", "decay", "merge", "evaluate", "export", "sft", "cap", "export_chat"]
    assert [job.name for job in chain.jobs] == names
    before = ["hf_to_mcore", "warmup", "stable", "decay", "merge", "evaluate", "merge", "sft", "cap"]
    assert [job.after for job in chain.jobs] == [(), *((name,) for name in before)]
    options = {job.name: sbatch_options(chain, job, Path("/project")) for job in chain.jobs}
    for name in names:
        is_on_gpus = name in ("warmup", "stable", "decay", "evaluate", "sft", "cap")
        assert (f"--partition={'batch' if is_on_gpus else 'cpu'}" in options[name]) and (
            ("--gpus-per-node=8" in options[name]) == is_on_gpus
        ), name
    assert [options[name][1] for name in names] == [
        "--nodes=1",
        "--nodes=4",
        "--nodes=8-16",
        "--nodes=8",
        "--nodes=1",
        "--nodes=1",
        "--nodes=1",
        "--nodes=8",
        "--nodes=8",
        "--nodes=1",
    ]
    configs = [job.config for job in chain.jobs if job.config]
    assert [config.checkpoint.load for config in configs] == [
        f"/r/llada2_mini_chat/{name}" for name in ("start", "warmup", "stable", "merged", "sft")
    ]
    exports = {job.name: job.arguments for job in chain.jobs if job.name.startswith("export")}
    assert "/r/llada2_mini_chat/merged" in exports["export"] and "/r/llada2_mini_chat/cap" in exports["export_chat"]
    *configs, sft, cap = configs
    assert sft.schedule.stages["sft"].sft == cap.schedule.stages["cap"].sft is not None
    assert {sft.data.train, cap.data.train} == {"/data/c"} and sft.model == configs[0].model
    # Together the three runs see what one run of the whole schedule sees.
    whole = compose_train_config(["experiment=llada2_mini", "data.train=x"]).schedule.stages
    stages = {name: stage for config in configs for name, stage in config.schedule.stages.items()}
    assert list(stages) == list(whole)
    for name, stage in stages.items():
        assert replace(stage, lr_warmup_tokens=whole[name].lr_warmup_tokens) == whole[name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=tiny_bse"], "experiment ('tiny_bse') is not a recipe; there are:"),
        (["experiment=tiny_base", "cluster=moon"], "cluster (moon) is not a recipe"),
        (["experiment=tiny_base", "cluster.partitoin=x"], "did you mean cluster.partition?"),
        (["experiment=tiny_base", "run.sed=3"], "did you mean run.seed?"),
        (["experiment=tiny_base", "oops"], "is not of the form key=value"),
        (["experiment=tiny_base", "name=x"], "['name=x'] would have no effect"),
        (["experiment=tiny_base", "root=/x"], "use run.name= and run.root="),
        (["experiment=tiny_base", "nodes=0"], "must satisfy 0 < min_nodes <= nodes"),
        (["experiment=three", "name=???"], "name (???) is required"),
        (["experiment=tiny_base", "nodes=two"], "nodes (two) must be a whole number"),
        (["experiment=tiny_base", "run.name='a b'"], "it names a folder"),
        (["experiment=tiny_base", "run.name='$(touch /tmp/x)'"], "it names a folder"),
        (["experiment=tiny_base", "run.name='x\"y'"], "it names a folder"),
        (["experiment=three", "nodes=2"], "nodes has no effect on a chain"),
        (["experiment=three", "run.name=x"], "use name= and root="),
        (["experiment=three", "name=../x"], "it names a folder"),
        (["experiment=three", "jobs.base.module=x"], "must have either experiment"),
        (["experiment=three", "jobs.base.after=[convert]"], "must name a job listed before it"),
        (["experiment=three", "jobs.first.nodes=2"], "must be 1 for a tool"),
        (["experiment=three", "jobs.base.ranks_per_node=2"], "belong to a tool"),
        (["experiment=three", "cluster=h100x8", "jobs.first.ranks_per_node=9"], "every rank needs a GPU of its own"),
        (["experiment=llada2_mini_full", "inputs.train=x"], "inputs.hf, inputs.validation must be given"),
        (["experiment=llada2_mini_full", "inputs.hff=x"], "inputs.hff is not a key"),
        (["experiment=three", "jobs.first.module='os;ls'"], "dotted name of a Python module"),
        (["experiment=tiny_base", "cluster.time_limit='1 day'"], "must read HH:MM:SS"),
        (["experiment=tiny_base", "cluster.environment.A-B=x"], "not the name of an environment variable"),
        (["experiment=tiny_base", "cluster.modules=['cuda; rm']"], "not a module's name"),
        (["experiment=tiny_base", "cluster.memory='64 GB'"], "cluster.memory ('64 GB') must be a number"),
        (
            ["experiment=tiny_base", "cluster.cpus_per_node=1", "cluster.ranks_per_node=2"],
            "cpus_per_node (1) must give",
        ),
        (["experiment=tiny_base", "cluster.cpu_cpus=0"], "cluster.cpu_cpus (0) must be positive"),
        (["experiment=tiny_base", "cluster.container.kind=docker"], "is not known"),
        (["experiment=tiny_base", "cluster.container.kind=pyxis"], "is needed with kind pyxis"),
        (
            ["experiment=tiny_base", "cluster.gpus_per_node=2", "cluster.ranks_per_node=4"],
            "must not exceed gpus_per_node",
        ),
    ],
)
def test_mistakes_are_refused_in_one_sentence(recipes: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        compose_chain(words, recipes)
    assert message in str(caught.value)


@pytest.mark.parametrize("cluster", sorted(path.stem for path in (RECIPES / "cluster").glob("*.yaml")))
def test_every_cluster_describes_a_job(cluster: str) -> None:
    chain = compose_chain(
        [
            "experiment=tiny_base",
            f"cluster={cluster}",
            "schedule.stages.ar.micro_batch_size=1",
            "schedule.stages.ar.global_batch_size=8",
        ]
    )
    assert sbatch_options(chain, chain.jobs[0], Path("/project"))


def test_a_folder_with_one_chain_adds_to_the_shipped_recipes(tmp_path: Path) -> None:
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain" / "two.yaml").write_text(
        "# @package _global_\nname: two\njobs:\n  base: {experiment: tiny_base}\n"
        "  measure: {module: megatron_dllm.evaluate, arguments: [experiment=tiny_base]}\n"
    )
    base, measure = compose_chain(["experiment=two", "cluster=h100x8"], tmp_path).jobs
    assert base.config is not None and "--config-dir" not in base.arguments
    assert measure.arguments[-3:] == ("experiment=tiny_base", "--config-dir", str(tmp_path))
    assert compose_chain(["experiment=tiny_base"], tmp_path).jobs[0].config is not None
    with pytest.raises(ValueError, match=r"experiment \('tow'\) is not a recipe; there are: .*tiny_base, .*two"):
        compose_chain(["experiment=tow"], tmp_path)


@pytest.mark.parametrize(
    "name", ["a,b=c#d (x) x[1] y{2} am&p ex!c ~ jörg", 'it\'s \\ "so" `x` $HOME <y>; z|*?', "2024_01"]
)
def test_paths_stay_as_they_were_typed_in_every_job(name: str) -> None:
    inputs = {key: f"/data/{name}/{key}" for key in ("hf", "train", "validation", "chats")}
    words = [f"inputs.{key}={value}" for key, value in inputs.items()]
    chain = compose_chain(["experiment=llada2_mini_chat", f"root=/runs/{name}", *words])
    jobs = {job.name: job for job in chain.jobs}
    assert chain.folder == Path(f"/runs/{name}/llada2_mini_chat")
    config = jobs["warmup"].config
    assert config is not None and (config.data.train, config.data.validation) == (inputs["train"], inputs["validation"])
    assert config.run.root == str(chain.folder) and config.checkpoint.load == f"{chain.folder}/start"
    given = jobs["hf_to_mcore"].spec.arguments
    assert inputs["hf"] in given and f"{chain.folder}/start" in given


@pytest.mark.parametrize("name", ["3e5", "8e12345", "1e999", "2024_01", "1_000", "1.50", "true", "007", "v1.0"])
def test_names_stay_as_they_were_typed(name: str) -> None:
    assert compose_chain(["experiment=tiny_demo", f"name={name}"]).folder == Path("runs") / name
    chain = compose_chain(["experiment=tiny_base", f"run.name={name}", f"cluster.account={name}"])
    assert chain.folder.name == name and chain.config.cluster.account == name


def test_what_the_shipped_recipes_bring_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [generate] = [job for job in compose_chain(["experiment=tiny_demo"]).jobs if job.name == "generate"]
    [prompts] = [word.partition("=")[2] for word in generate.arguments if word.startswith("prompts_file=")]
    assert Path(prompts).is_absolute() and Path(prompts).is_file()


def test_contexts_grow_from_run_to_run() -> None:
    """Each run starts from the one before, stretched from Ling's own 32k; needles and export read the last."""
    words = [
        "inputs.start=/data/merged",
        "inputs.train=[0.5, /data/short, 0.5, /data/long]",
        "inputs.validation=/data/v",
    ]
    chain = compose_chain(["experiment=llada2_mini_long", "root=/r", *words])
    runs = [job.config for job in chain.jobs if job.config is not None]
    assert [config.schedule.context_length for config in runs] == [32768, 65536, 131072]
    assert [config.model.rotary_scaling and config.model.rotary_scaling.factor for config in runs] == [None, 2.0, 4.0]
    for config in runs:
        config.validate(64)
        assert config.train_corpora == ("/data/short", "/data/long")
        assert config.schedule.stages["long"].global_batch_size * config.schedule.context_length == 2**21
    folder = "/r/llada2_mini_long"
    assert [config.checkpoint.load for config in runs] == ["/data/merged", f"{folder}/to_32k", f"{folder}/to_64k"]
    assert all(f"{folder}/to_128k" in " ".join(job.arguments) for job in chain.jobs if job.config is None)

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launch.chain import compose_chain
from launch.job import job_script, sbatch_options, supervisor_details, valid_nodes
from launch.jobs import Chain
from tests.conftest import NOT_RUN

NASTY = "a b'c\"d$(touch /tmp/pwned)`x`;\\n"


def chain_of(*words: str) -> Chain:
    return compose_chain(
        [
            "experiment=tiny_base",
            "schedule.stages.ar.global_batch_size=8",
            "schedule.stages.ar.micro_batch_size=1",
            *words,
        ]
    )


def options_of(*words: str) -> list[str]:
    chain = chain_of(*words)
    return sbatch_options(chain, chain.jobs[0], Path("/project"))


def test_options_follow_the_cluster() -> None:
    options = options_of(
        "cluster.partition=p",
        "cluster.account=acc",
        "cluster.gpus_per_node=8",
        "cluster.gpu_type=h100",
        "cluster.ranks_per_node=4",
        "cluster.cpus_per_node=96",
        "cluster.is_exclusive=true",
        "cluster.sbatch_options=['--switches=1']",
        "nodes=2",
        "cluster.time_limit='1-00:00:00'",
        "cluster.stop_seconds=600",
    )
    for expected in (
        "--partition=p",
        "--account=acc",
        "--gpus-per-node=h100:8",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--cpus-per-task=24",
        "--exclusive",
        "--switches=1",
        "--time=24:00:00",
        "--signal=B:USR1@600",
        "--requeue",
        "--open-mode=append",
    ):
        assert expected in options
    assert not [option for option in options_of() if option.startswith(("--account", "--partition", "--gpus"))]


def test_an_elastic_run_lists_the_nodes_it_fits() -> None:
    chain = chain_of("nodes=8", "min_nodes=1", "cluster.ranks_per_node=1")
    # A global batch of 8 rows divides over 8, 4, 2 and 1 replicas.
    assert valid_nodes(chain, chain.jobs[0]) == [8, 4, 2, 1]
    options = sbatch_options(chain, chain.jobs[0], Path("/project"))
    assert "--nodes=1-8" in options
    # SLURM would take tasks a node as a reason to give the fewest nodes.
    assert not [option for option in options if option.startswith("--ntasks")]


def test_an_elastic_run_keeps_the_nodes_that_a_part_of_its_schedule_needs() -> None:
    chain = chain_of("nodes=4", "min_nodes=1", "cluster.ranks_per_node=1", "schedule.stages.ar.world_size=4")
    assert valid_nodes(chain, chain.jobs[0]) == [4]
    chain = chain_of("nodes=4", "min_nodes=1", "cluster.ranks_per_node=1", "schedule.stages.ar.world_size=2")
    assert valid_nodes(chain, chain.jobs[0]) == [4, 3, 2]


def test_a_tool_is_one_process_without_a_gpu_unless_it_asks_for_ranks(recipes: Path) -> None:
    def options(*words: str) -> list[str]:
        chain = compose_chain(["experiment=three", "cluster=h100x8", "cluster.cpu_partition=cpu", *words], recipes)
        details = supervisor_details(chain, chain.jobs[0], Path("/code"), Path("/project"))
        return [*sbatch_options(chain, chain.jobs[0], Path("/project")), *details["srun_options"]]

    plain = options()
    assert "--partition=cpu" in plain and "--ntasks-per-node=1" in plain and "--cpu-bind=none" in plain
    assert not [option for option in plain if option.startswith(("--gpus", "--exclusive"))]
    parallel = options("jobs.first.ranks_per_node=4", "jobs.first.nodes=2")
    for expected in ("--partition=batch", "--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4"):
        assert expected in parallel
    # 96 cores a node: 24 for each rank, which srun keeps it to.
    assert parallel.count("--cpus-per-task=24") == 2 and "--cpu-bind=none" not in parallel


def test_a_layout_that_does_not_fit_is_refused() -> None:
    chain = chain_of("nodes=3", "cluster.ranks_per_node=1")
    with pytest.raises(ValueError, match="global_batch_size"):
        valid_nodes(chain, chain.jobs[0])


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason=f"{NOT_RUN}no shellcheck here; apt-get install -y shellcheck"
)
@pytest.mark.ranks
def test_scripts_pass_shellcheck(tmp_path: Path) -> None:
    fixture = Path(__file__).parents[2] / "slurm" / "fixture"
    script = tmp_path / "job.sh"
    chain = chain_of("cluster.modules=[cuda/12.4, gcc]", "cluster.environment.NCCL_DEBUG=WARN")
    script.write_text(job_script(chain, chain.jobs[0], tmp_path / "code dir", tmp_path / "it's here"))
    done = subprocess.run(
        ["shellcheck", "-x", str(script), *map(str, sorted(fixture.glob("*.sh")))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_secret_values_are_not_shown(tmp_path: Path) -> None:
    chain = chain_of("cluster.environment.NCCL_DEBUG=WARN")
    names = ("WANDB_API_KEY", "hf_token", "MY_SECRET", "DbPassword")
    chain.config.cluster.environment.update({name: f"hidden\n{name} of mine" for name in names})
    shown, whole = (
        job_script(chain, chain.jobs[0], tmp_path, tmp_path, is_masked=is_masked) for is_masked in (True, False)
    )
    assert "hidden" not in shown and "of mine" not in shown and whole.count("of mine") == len(names)
    assert all(f"export {name}='***'" in shown for name in names) and "export NCCL_DEBUG=WARN" in shown


@pytest.mark.ranks
def test_nothing_in_a_script_is_evaluated(tmp_path: Path) -> None:
    project = tmp_path / NASTY.replace("/", "_")
    project.mkdir()
    (project / "launch").mkdir()
    (project / "launch" / "supervise.py").write_text("import os; print(os.environ['VALUE']); print(os.getcwd())")
    chain = chain_of()
    chain.config.cluster.environment["VALUE"] = NASTY
    script = tmp_path / "job.sh"
    script.write_text(job_script(chain, chain.jobs[0], project, project))
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{NASTY}\n{project}\n"
    assert not Path("/tmp/pwned").exists()


def test_containers_become_options_or_a_prefix(tmp_path: Path) -> None:
    words = ["cluster.container.image=/images/x.sqsh", "cluster.container.mounts=['/data:/data:ro']"]
    chain = chain_of("cluster.container.kind=pyxis", *words)
    details = supervisor_details(chain, chain.jobs[0], tmp_path, Path("/project"))
    assert "--container-image=/images/x.sqsh" in details["srun_options"]
    mounts = next(option for option in details["srun_options"] if option.startswith("--container-mounts="))
    assert "/data:/data:ro" in mounts and "/project:/project" in mounts
    assert details["command_prefix"] == [] and details["rank_python"] == "python"
    chain = chain_of("cluster.container.kind=apptainer", "cluster.gpus_per_node=1", *words)
    details = supervisor_details(chain, chain.jobs[0], tmp_path, Path("/project"))
    assert details["command_prefix"][:3] == ["apptainer", "exec", "--nv"]
    assert details["command_prefix"][-1] == "/images/x.sqsh"

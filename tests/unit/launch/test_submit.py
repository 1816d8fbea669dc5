"""Submission with stand-ins for SLURM's commands on PATH; the real ones are met in tests/slurm."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from launch import freeze, record, submit
from megatron_dllm.run import code_version
from megatron_dllm.run.files import write_json

pytestmark = pytest.mark.ranks  # the stand-ins are programs
CHAIN = """# @package _global_
name: pair
root: %s
jobs:
  first: {module: platform}
  second: {module: platform}
"""
# Job numbers count up from 101; FAIL_AT is the call that is refused, and every call notes what chain.json says.
SBATCH = """#!/bin/bash
[[ " $* " == *" --test-only "* ]] && exit 0
cat "$HOME/pair/chain.json" >>"$HOME/books" 2>/dev/null; echo >>"$HOME/books"
count=$(wc -l <"$HOME/calls"); echo call >>"$HOME/calls"
[ "$count" != "$FAIL_AT" ] || { echo "sbatch: error: the queue is full" >&2; exit 1; }
echo $((count + 101))
"""


@pytest.fixture
def pair(recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words that submit a chain of two tools to the stand-ins."""
    (recipes / "chain" / "pair.yaml").write_text(CHAIN % tmp_path)
    commands = {
        "sbatch": SBATCH,
        "scancel": '#!/bin/sh\necho "$@" >>"$HOME/cancelled"\n',
        "squeue": '#!/bin/sh\ncat "$HOME/queue"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("calls", "queue"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    return ["experiment=pair", "--config-dir", str(recipes)]


def test_a_refused_job_takes_those_before_it_along(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL_AT", "1")
    refusal = "job second: SLURM refused the job: the queue is full; no job of this chain is left in the queue."
    with pytest.raises(ValueError, match=refusal):
        submit.main(pair)
    assert (tmp_path / "cancelled").read_text() == "101\n"
    # Had submit.py been killed at the second call, the first job would have been known already.
    assert '"job_id": "101"' in (tmp_path / "books").read_text()


def test_a_job_s_script_is_its_owner_s_alone(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = secrets.token_hex()
    words = [*pair, f"cluster.environment.API_TOKEN={token}"]
    assert submit.main([*words, "--dry_run"]) == 0
    assert token not in capsys.readouterr().out and not (tmp_path / "pair").exists()
    assert submit.main(words) == 0
    holding = {
        path for path in (tmp_path / "pair").rglob("*") if path.is_file() and token.encode() in path.read_bytes()
    }
    scripts = {tmp_path / "pair" / "launch" / name / "job.sh" for name in ("first", "second")}
    assert holding == scripts and {path.stat().st_mode & 0o777 for path in scripts} == {0o600}


@pytest.mark.parametrize("key", ["cluster.scratch", "cluster.environment.TMPDIR"])
def test_a_folder_too_long_for_sockets_is_refused_before_anything_is_submitted(
    key: str, pair: list[str], tmp_path: Path
) -> None:
    longest = "/" + 71 * "x"
    word = f"+{key}=" if "environment" in key else f"{key}="
    with pytest.raises(ValueError, match=rf"{key} \({longest}y\) must be at most 72 bytes long"):
        submit.main([*pair, f"{word}{longest}y"])
    assert (tmp_path / "calls").read_text() == ""
    submit.main([*pair, f"{word}{longest}", "--dry_run"])


def test_an_interrupted_submission_leaves_no_jobs(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(["101"])

    def interrupted(words: list[str]) -> str:
        for number in numbers:
            return number
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "sbatch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit.main(pair)
    assert (tmp_path / "cancelled").read_text() == "101\n"


def test_jobs_of_a_killed_submission_are_found_in_the_queue(pair: list[str], tmp_path: Path) -> None:
    (tmp_path / "queue").write_text(f"7 {tmp_path}/pair/launch/second/job.sh\n8 /elsewhere/job.sh\n9 \n")
    with pytest.raises(ValueError, match=r"pair is in the queue already \(second: job 7\)"):
        submit.main(pair)
    assert not (tmp_path / "calls").read_text()


def test_code_is_frozen_without_git(pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    freeze.freeze_environment(tmp_path)
    assert (tmp_path / "commit.txt").read_text() == "no git repository\n"
    code = freeze.freeze_code(tmp_path)
    assert (code / "launch" / "supervise.py").is_file() and (code / "recipes" / "train.yaml").is_file()


def test_a_frozen_copy_knows_the_commit_it_was_made_from(tmp_path: Path) -> None:
    code = freeze.freeze_code(tmp_path)
    script = "from megatron_dllm.run.code_version import code_state; print(code_state(), end='')"
    told = subprocess.run([sys.executable, "-c", script], cwd=code, capture_output=True, text=True, check=True).stdout
    assert told == code_version.code_state()


def test_status_tells_elbo_and_time_left(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=tiny_base", f"run.root={tmp_path}", "run.name=run"]
    job = tmp_path / "run" / "launch" / "train"
    job.mkdir(parents=True)
    write_json(tmp_path / "run" / "chain.json", {"jobs": {"train": {"job_id": "7"}}})
    write_json(job / "job.json", {"run_folder": str(tmp_path / "run")})
    (job / "config.yaml").write_text("schedule:\n  stages:\n    ar:\n      num_tokens: 8000\nrun:\n  seed: 1\n")
    record.append_event(job, "start", digest="x")
    record.append_event(job, "training", attempt="attempt_0002", seconds=9.0, pause=41.3)
    lines = [
        {"step": 4, "loss": 2.5, "tokens_per_second": 10.0, "consumed_tokens": 400},
        {"step": 4, "validation": True, "validation_elbo/32": 3.25},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "queue").write_text("7|RUNNING|None\n")
    assert submit.main([*words, "--status"]) == 0
    shown = capsys.readouterr().out
    # 7600 tokens at 10 a second.
    for text in ("running", "2.5000", "3.2500", "00:12:40", "1 (pause 41 s)"):
        assert text in shown


def test_a_folder_of_recipes_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"--config-dir \(none\) must be a folder of recipes, which adds to the shipped"
    ):
        submit.main(["experiment=tiny_base", "--config-dir", "none"])

"""What the environment says about this process's place, and what of it is not believed."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from megatron_dllm.run.place import (
    Place,
    check_temporary_folder,
    is_rank_zero,
    read_place,
    require_one_process,
    without_place,
    world_size,
)

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TASK = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", **MEETING}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place(0, 1, 0)),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "3", **MEETING}, Place(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "1", **MEETING}, Place(3, 16, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Place(0, 1, 0)),
        ({"RANK": "0"}, Place(0, 1, 0)),
        # A launcher's own words go before SLURM's: one torchrun a node.
        ({**TASK, "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Place(1, 4, 1)),
        # The shell of a job of one task, and of an allocation without a task.
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Place(0, 1, 0)),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, Place(0, 1, 0)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Place(0, 1, 0)),
    ],
)
def test_place(variables: dict[str, str], place: Place) -> None:
    assert read_place(variables) == place


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": ""}, r"WORLD_SIZE \(''\) must be a whole number"),
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE \('two'\)"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "at least 1"),
        ({"WORLD_SIZE": "²", "RANK": "0"}, "must be a whole number"),
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE \(2\) is set and RANK is not"),
        ({"RANK": "", "WORLD_SIZE": "2", **MEETING}, r"RANK \(''\) must be"),
        ({"RANK": "-1", "WORLD_SIZE": "2", **MEETING}, r"RANK \('-1'\) must be"),
        ({"RANK": "1"}, r"RANK \(1\) is set and WORLD_SIZE is not"),
        ({"RANK": "7", "WORLD_SIZE": "2", **MEETING}, r"RANK \(7\) must be below WORLD_SIZE \(2\)"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "x", **MEETING}, r"LOCAL_RANK \('x'\)"),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING}, r"LOCAL_RANK \(none\) must be set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MEETING, "MASTER_PORT": "99999"}, "1 to 65535"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MEETING, "MASTER_PORT": "http"}, "MASTER_PORT"),
        (TASK, r"SLURM_NTASKS \(2\) says that SLURM runs 2 tasks, and RANK is not set"),
        ({**TASK, "WORLD_SIZE": "2"}, "SLURM runs 2 tasks"),
        ({**TASK, "SLURM_PROCID": "0"}, "SLURM runs 2 tasks"),
        ({**TASK, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "4"}, "SLURM runs 4 tasks"),
    ],
)
def test_nonsense_is_refused(variables: dict[str, str], message: str, environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read_place(variables)
    assert "torchrun" in str(refused.value) and "launch/submit.py" in str(refused.value)
    for name, value in variables.items():
        environment.setenv(name, value)
    assert is_rank_zero(), "somebody has to say what is wrong"


def test_the_process_s_own_environment_is_read(environment: pytest.MonkeyPatch) -> None:
    assert world_size() == 1 and is_rank_zero()
    for name, value in {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", **MEETING}.items():
        environment.setenv(name, value)
    assert world_size() == 16 and not is_rank_zero()


@pytest.mark.parametrize(
    ("variables", "is_one"),
    [
        ({}, True),
        ({"WORLD_SIZE": "1", "RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, False),
        ({"WORLD_SIZE": ""}, False),
        (TASK, False),
        # A batch script of several tasks starts its own commands once.
        ({**TASK, "SLURM_PROCID": "0"}, True),
    ],
)
def test_work_of_one_process(environment: pytest.MonkeyPatch, variables: dict[str, str], is_one: bool) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    if is_one:
        require_one_process("decoding")
    else:
        with pytest.raises(ValueError, match="WORLD_SIZE"):
            require_one_process("decoding")


def test_a_launcher_hands_on_no_other_s_place() -> None:
    inherited = {**TASK, "RANK": "1", "TORCHELASTIC_RUN_ID": "x", "PATH": "/bin", "SLURM_CONF": "c"}
    assert without_place(inherited) == {"PATH": "/bin", "SLURM_CONF": "c", "SLURM_JOB_ID": "77"}


@pytest.mark.parametrize(("length", "is_right"), [(72, True), (73, False)])
def test_a_temporary_folder_must_leave_room_for_sockets(
    length: int, is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest socket that torch and multiprocessing make below it: its path must stay within the kernel's limit."""
    folder = "/" + "x" * (length - 1)
    assert (len(f"{folder}/torch-shm-dir-XXXXXX/manager.sock") <= 107) or not is_right
    monkeypatch.setattr("tempfile.tempdir", folder)
    with nullcontext() if is_right else pytest.raises(ValueError, match=r"TMPDIR \(/x+\) must be at most 72 bytes"):
        check_temporary_folder()

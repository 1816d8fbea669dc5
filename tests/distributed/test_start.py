"""What a start costs the file system: rank 0 walks a checkpoint once, the others read their share of its content."""

from __future__ import annotations

import os
import pickle
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import MODEL, checkpoints_of, run_config, write_corpus
from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.manifest import write_manifest
from megatron_dllm.checkpoint.meta import CheckpointMeta, Position, write_meta
from megatron_dllm.config import TrainConfig
from megatron_dllm.parallel import groups
from megatron_dllm.parallel.meeting import meet
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import STATE


def write_checkpoint(config: TrainConfig, num_files: int) -> Path:
    """A whole checkpoint of so many small files, which nobody would load."""
    from torch.distributed.checkpoint.metadata import Metadata

    from megatron_dllm.training.blends import stage_shares
    from megatron_dllm.training.run_state import RunState
    from megatron_dllm.training.sources import Sources
    from megatron_dllm.training.start import new_stream, semantics_of

    folder = folders.step_folder(checkpoints_of(config), 3)
    folder.mkdir(parents=True)
    for index in range(num_files):
        (folder / f"__{index}_0.distcp").write_bytes(index.to_bytes(4, "little"))
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({})))
    sources = Sources(config)
    stream, shares = new_stream(config, sources), stage_shares(config, sources)
    stream.use(shares["warmup"])
    state = RunState(step=3, consumed_tokens=300, stream=stream.state_dict(), blends=shares)
    semantics = semantics_of(config, config.schedule.stages["warmup"])
    write_meta(folder, CheckpointMeta(asdict(MODEL), semantics, Position(step=3, consumed_tokens=300, stage="warmup")))
    write_json(folder / STATE, asdict(state))
    write_manifest(folder, {})
    return folder


def _count_calls(root: Path, calls: Counter[str]) -> None:
    """Count what this process asks the file system below `root`; for `stat` there is no audit event."""

    def is_below(path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(root))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.scandir", "os.listdir") and arguments and is_below(arguments[0]):
            calls[event] += 1

    stat = os.stat

    def counted(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if is_below(path):
            calls["stat"] += 1
        return stat(path, *args, **kwargs)

    sys.addaudithook(audit)
    os.stat = counted  # this process ends with the test


def _start(config: TrainConfig, folder: Path) -> tuple[str, dict[str, int]]:
    """The checkpoint that was decided on, and the calls of this rank."""
    from megatron_dllm.checkpoint.loading import verify
    from megatron_dllm.training.sources import Sources
    from megatron_dllm.training.start import decide_start

    calls: Counter[str] = Counter()
    _count_calls(checkpoints_of(config), calls)
    meeting = meet(config.run)
    start = meeting.decide(lambda: decide_start(config, 2, Sources(config)))
    groups.initialize(start.layout, config.run, meeting)
    assert start.resume is not None
    verify(start.resume.folder)
    return start.resume.folder.name, dict(calls)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, int]]]:
    """By number of files, the calls of each of two ranks."""
    path = tmp_path_factory.mktemp("start")
    write_corpus(path / "corpus")
    found = {}
    for num_files in (512, 1024):
        config = run_config(path, f"files_{num_files}")
        folder = write_checkpoint(config, num_files)
        results = run_ranks(_start, 2, config, folder)
        assert [name for name, _ in results] == ["step_0000003"] * 2
        found[num_files] = [counts for _, counts in results]
    return found


def test_the_other_ranks_ask_for_no_sizes_and_list_no_folders(calls: dict[int, list[dict[str, int]]]) -> None:
    for num_files, (_, other) in calls.items():
        # Its half of the files, with .metadata and two descriptions among them; rank 0 has read the manifest to it.
        assert set(other) == {"open"}
        assert other["open"] == (num_files + 3) // 2


def test_rank_0_asks_in_proportion_to_the_files(calls: dict[int, list[dict[str, int]]]) -> None:
    small, large = calls[512][0], calls[1024][0]
    # Once when it decides, once when it looks again before the content is compared.
    assert large["stat"] - small["stat"] == 2 * 512
    assert large["stat"] < 2 * 1024 + 20
    assert large["open"] - small["open"] == 256
    assert large.get("os.scandir", 0) + large.get("os.listdir", 0) < 10


def _train_without_corpus(config: TrainConfig) -> str:
    """What a run says whose second rank cannot read the documents."""
    from megatron_dllm.train import train
    from megatron_dllm.training.parts import Parts
    from megatron_dllm.training.sources import open_corpus

    def open_here(prefix: str, config: TrainConfig) -> Any:
        return open_corpus(prefix if os.environ["RANK"] == "0" else f"{prefix}_not_mounted", config)

    with pytest.raises(ValueError) as refused:
        train(config, lambda: Parts(open_source=open_here))
    return str(refused.value)


def test_a_rank_that_cannot_read_the_documents_is_named_on_every_rank(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    first, second = run_ranks(_train_without_corpus, 2, run_config(tmp_path, "run"), timeout_s=300.0)
    assert first == second and first.startswith(f"rank 1: corpus {tmp_path}/corpus_not_mounted has no")

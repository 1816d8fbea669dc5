"""What reading a checkpoint survives: damage, strangers' pickles, and checkpoints of other runs."""

from __future__ import annotations

import logging
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.ranks import run_ranks
from benchmarks.tiny_run import MODEL, checkpoints_of, run_config, write_corpus
from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.manifest import checksum, read_json
from megatron_dllm.config import ParallelConfig, TrainConfig
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import MANIFEST, STATE
from tests.distributed.checkpoint_run import OPTIMIZER_STEP, build, fill_moments, flip_bit, save, writer_of


def _truncate(folder: Path) -> None:
    os.truncate(folder / "__1_0.distcp", 1000)


def _alter(folder: Path) -> None:
    flip_bit(folder / "__0_0.distcp")


def _alter_state(folder: Path) -> None:
    path = folder / STATE
    path.write_text(path.read_text().replace(f": {OPTIMIZER_STEP}", ": 8"))


def _lose(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def _half(folder: Path) -> None:
    for name in (MANIFEST, STATE, ".metadata"):
        (folder / name).unlink()


class _Payload:
    """Code that a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(_Payload.where),)

    where = Path()


def _poison(folder: Path) -> None:
    _Payload.where = folder.parent / "pickle_ran"
    (folder / ".metadata").write_bytes(pickle.dumps(_Payload()))
    manifest = read_json(folder / MANIFEST)
    manifest[".metadata"] = checksum(folder / ".metadata")  # a careful stranger
    write_json(folder / MANIFEST, manifest)


DAMAGES = {
    _truncate: "__1_0.distcp has 1000 bytes instead of",
    _alter: "__0_0.distcp does not have the checksum",
    _alter_state: "state.json does not have the checksum",
    _lose: "__1_0.distcp is missing",
    _half: "manifest.json is missing",
    _poison: ".metadata is not the metadata of a torch_dist checkpoint",
}


def _load_damaged(folder: Path) -> dict[str, tuple[str, str, list[str]]]:
    """For each damage of the newest: what an explicit load says, where a resume starts, and its warnings."""
    from megatron_dllm.checkpoint.loading import load_weights

    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_dllm.training.loading").addHandler(handler)
    config = run_config(folder, "run")
    engine = build(folder, ParallelConfig())
    fill_moments(engine)
    save(writer_of(folder), 1, engine)
    results = {}
    for damage in DAMAGES:
        newest = save(writer_of(folder), 2, engine)
        dist.barrier()
        if dist.get_rank() == 0:
            damage(newest)
        dist.barrier()
        with pytest.raises(ValueError) as caught:
            load_weights(newest, engine.chunks)
        warnings.clear()
        found = _start(config, engine)
        results[damage.__name__] = (str(caught.value), found.resume.folder.name, list(warnings))
        dist.barrier()
    if dist.get_rank() == 0:
        _alter(folders.step_folder(checkpoints_of(config), 1))
    dist.barrier()
    with pytest.raises(
        ValueError, match=r"holds no whole checkpoint: all of \['step_0000001'\] are damaged .*checksum"
    ):
        _start(config, engine)
    return results


def _start(config: TrainConfig, engine: Any) -> Any:
    """Decide on rank 0 and load, as a start does."""
    from megatron_dllm.training.loading import load_start
    from megatron_dllm.training.sources import Sources
    from megatron_dllm.training.start import decide_start

    decided: list[Any] = [None]
    if dist.get_rank() == 0:
        decided = [decide_start(config, 2, Sources(config))]
    dist.broadcast_object_list(decided)
    return load_start(decided[0], engine, lambda passed: decide_start(config, None, Sources(config), passed), True)


def test_damage_is_named_and_a_resume_falls_back_aloud(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    first, second = run_ranks(_load_damaged, 2, tmp_path, timeout_s=500.0)
    for damage, words in DAMAGES.items():
        for results in (first, second):
            message, found, _ = results[damage.__name__]
            assert words in message
            assert found == "step_0000001"
        warnings = first[damage.__name__][2]
        assert words in warnings[0]
        assert "passed over step_0000002" in warnings[0]
        assert "renamed to damaged-step_0000002; the run continues from step_0000001" in warnings[1]
        assert len(warnings) == 3 and warnings[2].startswith("resumed ")
        assert second[damage.__name__][2] == [], "each warning is said once"
    assert not (checkpoints_of(run_config(tmp_path, "run")) / "pickle_ran").exists()


def _other_identity(folder: Path) -> list[str]:
    from megatron_dllm.training.sources import Sources
    from megatron_dllm.training.start import decide_start

    engine = build(folder, ParallelConfig())
    fill_moments(engine)
    save(writer_of(folder), 1, engine)
    config = run_config(folder, "run")
    others = [
        replace(config, model=replace(MODEL, hidden_size=64)),
        replace(config, data=replace(config.data, block_origin="row")),
        replace(config, model=replace(MODEL, mask_token_id=3)),
        replace(config, parallel=ParallelConfig(precision="bf16")),
        replace(
            config,
            schedule=replace(
                config.schedule,
                stages={**config.schedule.stages, "stable": replace(config.schedule.stages["stable"], block_size=16)},
            ),
        ),
        replace(config, schedule=replace(config.schedule, stages={"other": config.schedule.stages["stable"]})),
    ]
    said = []
    for other in others:
        with pytest.raises(ValueError) as caught:
            decide_start(other, 1, Sources(other))
        said.append(str(caught.value))
    return said


def test_a_checkpoint_of_another_model_or_contract_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    model, grid, mask, precision, block, stages = run_ranks(_other_identity, 1, tmp_path, timeout_s=300.0)[0]
    assert "model.hidden_size (64) differs from the checkpoint" in model
    assert "block_origin (row) differs from the checkpoint" in grid
    assert "model.mask_token_id (3) differs from the checkpoint" in mask
    assert "parallel.precision (bf16) differs from the checkpoint" in precision
    assert "schedule.stages.stable: block_size (16) differs from the checkpoint" in block
    assert "schedule.stages has no stable, the stage of the checkpoint" in stages

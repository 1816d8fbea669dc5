from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.identity import check_identity, check_start
from megatron_dllm.checkpoint.manifest import (
    check_complete,
    checksum,
    damaged_files,
    is_complete,
    payload_files,
    read_json,
)
from megatron_dllm.checkpoint.retention import retire
from megatron_dllm.config import ModelConfig, ScheduleConfig, StageConfig, TrainConfig
from megatron_dllm.run.files import TEMPORARY_PREFIX, write_json
from megatron_dllm.run.names import CONTRACT, LATEST, MANIFEST, STATE, VALIDATION

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
    vocab_size=16,
    mask_token_id=2,
    eos_token_id=0,
    pad_token_id=1,
)


def _make(
    checkpoints: Path,
    step: int,
    elbo: float | None = None,
    is_stage_end: bool = False,
    block_size: int = 32,
    shift: bool = False,
    save_number: int | None = None,
) -> Path:
    """A checkpoint as the writer leaves it, one small file for the tensors."""
    final = folders.step_folder(checkpoints, step)
    temporary = final.with_name(TEMPORARY_PREFIX + final.name)
    temporary.mkdir(parents=True)
    contract = {
        "format": 1,
        "model": asdict(MODEL),
        "contract": {"block_origin": "document", "mask_token_id": 2, "block_size": block_size, "shift": shift},
        "step": step,
        "is_stage_end": is_stage_end,
        "save_number": save_number,
    }
    write_json(temporary / CONTRACT, contract)
    write_json(temporary / STATE, {"step": step, "consumed_tokens": 100 * step, "text": "x" * 50})
    (temporary / "__0_0.distcp").write_bytes(bytes(range(100)))
    manifest = {name: checksum(temporary / name) for name in payload_files(temporary)}
    write_json(temporary / MANIFEST, manifest)
    folders.publish(temporary, final)
    if elbo is not None:
        write_json(final / VALIDATION, {"elbo": {"32": elbo}, "target_block_size": 32})
    return final


def _steps(checkpoints: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in folders.list_checkpoints(checkpoints)]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(bytes(content))


# ---- complete or absent --------------------------------------------------------------------------


def test_published_checkpoint_is_complete_and_latest(tmp_path: Path) -> None:
    folder = _make(tmp_path, 7)
    assert is_complete(folder)
    assert (tmp_path / LATEST).read_text() == "step_0000007\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000007"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "__0_0.distcp is missing"),
        (_truncate, "has 99 bytes instead of 100"),
        (_alter, "does not have the checksum it was written with"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, words: str) -> None:
    folder = _make(tmp_path, 1)
    damage(folder / "__0_0.distcp")
    manifest = read_json(folder / MANIFEST)
    problems = damaged_files(folder, manifest, manifest)
    assert len(problems) == 1
    assert words in problems[0]
    assert str(folder) in problems[0]
    if damage is not _alter:  # sizes are looked at everywhere, contents when loading
        assert not is_complete(folder)
        with pytest.raises(ValueError, match="is damaged"):
            check_complete(folder)


@pytest.mark.parametrize("name", [CONTRACT, STATE])
def test_altered_descriptions_are_seen_without_reading_the_tensors(tmp_path: Path, name: str) -> None:
    good, folder = _make(tmp_path, 1), _make(tmp_path, 2)
    _alter(folder / name)
    with pytest.raises(ValueError, match=f"{name} does not have the checksum it was written with"):
        check_complete(folder)
    assert folders.latest_checkpoint(tmp_path) == good
    assert retire(tmp_path, keep_last=1, keep_best=0, keep_every=0) == []


@pytest.mark.parametrize("content", ["[]", '{"contract.json": 5}', '{"__0_0.distcp": {"size": 100, "sha256": "0"}}'])
def test_manifest_of_another_shape_is_damage(tmp_path: Path, content: str) -> None:
    (_make(tmp_path, 1) / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        check_complete(tmp_path / "step_0000001")


def test_folder_without_manifest_is_not_complete(tmp_path: Path) -> None:
    folder = _make(tmp_path, 1)
    (folder / MANIFEST).unlink()
    assert not is_complete(folder)
    with pytest.raises(ValueError, match=r"manifest.json is missing.*there is no older one"):
        folders.resolve_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        folders.resolve_checkpoint(tmp_path / "nowhere")


def test_latest_passes_over_incomplete_folders(tmp_path: Path) -> None:
    good = _make(tmp_path, 1)
    (_make(tmp_path, 2) / "__0_0.distcp").unlink()
    assert folders.latest_checkpoint(tmp_path) == good
    # A resume falls back and says so; what a user asks for by the run's name is the newest or nothing.
    with pytest.raises(ValueError, match=r"step_0000002 is the newest .*__0_0.distcp is missing.*is .*step_0000001"):
        folders.resolve_checkpoint(tmp_path)
    assert folders.resolve_checkpoint(good) == good
    assert folders.latest_checkpoint(tmp_path / "nowhere") is None


def test_publishing_again_replaces(tmp_path: Path) -> None:
    first = _make(tmp_path, 3)
    (first / "of_the_first").touch()
    assert _make(tmp_path, 3) == first
    assert not (first / "of_the_first").exists()
    assert _steps(tmp_path) == [3]


def test_set_aside_counts_no_more(tmp_path: Path) -> None:
    good, bad = _make(tmp_path, 1), _make(tmp_path, 2)
    for _ in range(2):
        aside = folders.set_aside(bad)
        assert aside.name == "damaged-step_0000002"
        assert folders.latest_checkpoint(tmp_path) == good
        _make(tmp_path, 2)


def test_leftovers_are_cleaned(tmp_path: Path) -> None:
    _make(tmp_path, 1)
    (tmp_path / ".tmp-step_0000002").mkdir()
    (tmp_path / ".tmp-step_0000002" / "__0_0.distcp").touch()
    (tmp_path / ".tmp-latest.123").touch()
    assert len(folders.clean_temporary(tmp_path)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000001"]


# ---- identity ------------------------------------------------------------------------------------


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = _make(tmp_path, 1)
    check_identity(folder, MODEL, {"block_origin": "document"})
    with pytest.raises(ValueError, match=r"model.hidden_size \(16\) differs from the checkpoint .* \(8\)"):
        check_identity(folder, replace(MODEL, hidden_size=16))
    with pytest.raises(ValueError, match=r"block_origin \(row\) differs from the checkpoint .* \(document\)"):
        check_identity(folder, MODEL, {"block_origin": "row"})
    with pytest.raises(ValueError, match=r"mask_token_id \(3\) differs"):
        check_identity(folder, MODEL, {"mask_token_id": 3})


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = _make(tmp_path, 1)
    stored = read_json(folder / CONTRACT)
    (folder / CONTRACT).write_text(json.dumps({**stored, "format": 99}))
    with pytest.raises(ValueError, match=r"format \(99\) is not 1"):
        check_identity(folder, MODEL)


def test_damaged_json_is_named(tmp_path: Path) -> None:
    folder = _make(tmp_path, 1)
    (folder / CONTRACT).write_text('{"format": 1,')
    with pytest.raises(ValueError, match=r"contract.json is damaged .* choose another checkpoint"):
        check_identity(folder, MODEL)


def _run(**stage: object) -> TrainConfig:
    schedule = ScheduleConfig(context_length=64, row_length=64, stages={"first": StageConfig(**stage)})
    return TrainConfig(model=MODEL, schedule=schedule)


def test_diffusion_weights_start_what_they_were_trained_for(tmp_path: Path) -> None:
    autoregressive, diffusion = _make(tmp_path / "ar", 1, shift=True), _make(tmp_path / "diffusion", 1)
    to_diffusion, to_ar = _run(objective="block_diffusion", block_size=4), _run(objective="ar", block_size=1)
    for folder, config in ((autoregressive, to_diffusion), (autoregressive, to_ar), (diffusion, to_diffusion)):
        check_start(folder, config)
    with pytest.raises(ValueError, match=r"stages.first.objective \(ar\) cannot start from the diffusion weights"):
        check_start(diffusion, to_ar)
    to_diffusion.data.block_origin = "row"
    check_start(autoregressive, to_diffusion)
    with pytest.raises(ValueError, match=r"data.block_origin \(row\) differs .* \(document\)"):
        check_start(diffusion, to_diffusion)


# ---- retention -----------------------------------------------------------------------------------


def test_the_last_ones_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        _make(tmp_path, step)
    deleted = retire(tmp_path, keep_last=2, keep_best=0, keep_every=0)
    assert [folder.name for folder in deleted] == ["step_0000010", "step_0000020"]
    assert _steps(tmp_path) == [30, 40]
    assert not list(tmp_path.glob(".tmp*"))


def test_the_best_ones_stay(tmp_path: Path) -> None:
    for step, elbo in ((10, 3.0), (20, 1.0), (30, 2.0), (40, float("nan")), (50, None), (60, 5.0)):
        _make(tmp_path, step, elbo)
    retire(tmp_path, keep_last=1, keep_best=2, keep_every=0)
    assert _steps(tmp_path) == [20, 30, 60]


def test_the_best_are_chosen_among_those_that_can_be_merged(tmp_path: Path) -> None:
    for step, elbo, block_size in ((10, 1.0, 512), (20, 1.1, 512), (30, 3.0, 32), (40, 2.0, 32), (50, 4.0, 32)):
        _make(tmp_path, step, elbo, block_size=block_size)
    retire(tmp_path, keep_last=1, keep_best=2, keep_every=0)
    assert _steps(tmp_path) == [30, 40, 50]


def test_multiples_and_stage_ends_stay(tmp_path: Path) -> None:
    # Steps are as long as rows are full: the third save at the interval is some step or other.
    for step, number in ((11, 1), (15, None), (19, 2), (31, 3), (38, 4), (52, 5), (64, 6), (70, None), (75, 7)):
        _make(tmp_path, step, is_stage_end=step == 15, save_number=number)
    retire(tmp_path, keep_last=1, keep_best=0, keep_every=3)
    assert _steps(tmp_path) == [15, 31, 64, 75]


def test_a_damaged_validation_deletes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step, elbo in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 5.0)):
        _make(tmp_path, step, elbo)
    (tmp_path / "step_0000010" / VALIDATION).write_text('{"elbo": [')
    retire(tmp_path, keep_last=1, keep_best=1, keep_every=0)
    assert _steps(tmp_path) == [10, 20, 40]
    assert "step_0000010 stays" in caplog.text


def test_the_only_good_one_is_never_deleted(tmp_path: Path) -> None:
    _make(tmp_path, 10)
    (_make(tmp_path, 20) / "__0_0.distcp").unlink()
    (_make(tmp_path, 30) / MANIFEST).unlink()
    assert retire(tmp_path, keep_last=1, keep_best=0, keep_every=0) == []
    assert _steps(tmp_path) == [10]

"""What a checkpoint folder is on disk: complete or absent, described by JSON, checked by checksums.

    checkpoints/latest                 name of the checkpoint written last
    checkpoints/step_0000100/
        contract.json                  model, contract (shift, block grid, mask token, block size), position
        state.json                     where the run continues: data position, schedule, optimizer step
        manifest.json                  size and sha256 of every file; written last
        validation.json                ELBO per block size, once evaluated
        .metadata metadata.json common.pt __0_0.distcp ...     megatron-core's torch_dist files
    checkpoints/.tmp-*                 being written, or left by a writer that was interrupted
    checkpoints/damaged-step_0000200/  set aside by a run that found it damaged when resuming

Pure standard library: tools read it without torch.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_dllm.checkpoint.manifest import check_complete, is_complete, payload_files
from megatron_dllm.run.files import TEMPORARY_PREFIX, remove, sync, write_text
from megatron_dllm.run.names import CHECKPOINTS, CONTRACT, LATEST

DAMAGED_PREFIX = "damaged-"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return checkpoints / f"step_{step:07d}"


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder into its place, instead of what lies there, and point `latest` at it."""
    for name in payload_files(temporary):
        sync(temporary / name)
    sync(temporary)
    remove(final)
    os.replace(temporary, final)
    sync(final.parent)
    write_text(final.parent / LATEST, final.name + "\n")


def step_folders(checkpoints: Path) -> list[Path]:
    """Every checkpoint folder, whole or not, oldest first."""
    return [f for f in sorted(checkpoints.glob("step_*")) if f.is_dir()] if checkpoints.is_dir() else []


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [folder for folder in step_folders(checkpoints) if is_complete(folder)]


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None; `latest` names the one written last, for people and scripts."""
    return next((folder for folder in reversed(step_folders(checkpoints)) if is_complete(folder)), None)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it counts no more and can still be looked at; returns its new place."""
    aside = folder.with_name(DAMAGED_PREFIX + folder.name)
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)
    return aside


def is_hf_folder(path: Path) -> bool:
    """Whether a model lies there as Hugging Face keeps it: a config.json, and no checkpoint of ours."""
    return (path / "config.json").is_file() and not (path / CONTRACT).is_file()


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest of a run folder.

    Raises:
        ValueError: there is none, or the newest one is damaged; an older one must be asked for by its name.
    """
    if (path / CONTRACT).is_file():
        return path
    for checkpoints in (path / CHECKPOINTS, path):
        for newest in step_folders(checkpoints)[-1:]:
            try:
                check_complete(newest)
            except ValueError as error:
                older = latest_checkpoint(checkpoints)
                remedy = f"the newest whole one is {older}" if older else "there is no older one"
                raise ValueError(f"{newest} is the newest checkpoint of {path}: {error} {remedy}.") from None
            return newest
    raise ValueError(f"{path} holds no complete checkpoint; give a run folder or one of its step_* folders.")


def clean_temporary(checkpoints: Path) -> list[Path]:
    """Delete what an interrupted writer left behind; returns what was deleted."""
    left = list(checkpoints.glob(f"{TEMPORARY_PREFIX}*")) if checkpoints.is_dir() else []
    for path in left:
        remove(path)
    return left

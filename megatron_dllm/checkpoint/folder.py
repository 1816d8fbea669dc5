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

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dllm.run.files import TEMPORARY_PREFIX, read_json_object, remove, sync, write_json, write_text
from megatron_dllm.run.names import CHECKPOINTS

log = logging.getLogger(__name__)

FORMAT = 1
CONTRACT, STATE, MANIFEST, VALIDATION, LATEST = (
    "contract.json",
    "state.json",
    "manifest.json",
    "validation.json",
    "latest",
)
DAMAGED_PREFIX = "damaged-"
_CHUNK = 1 << 22
# Fields of the model that decide what its tensors mean; others may change between runs.
IDENTITY = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "qk_layernorm",
    "layernorm_epsilon",
    "rotary_base",
    "rotary_percent",
    "tie_word_embeddings",
    "num_dense_layers",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_enable_expert_bias",
    "mask_token_id",
)


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return checkpoints / f"step_{step:07d}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint, which holds an object.

    Raises:
        ValueError: the file is missing, no JSON, or something else than an object.
    """
    try:
        return read_json_object(path, "choose another checkpoint")
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: {path.parent} is not a complete checkpoint; choose another one."
        ) from None


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder into its place, instead of what lies there, and point `latest` at it."""
    for name in payload_files(temporary):
        sync(temporary / name)
    sync(temporary)
    remove(final)
    os.replace(temporary, final)
    sync(final.parent)
    write_text(final.parent / LATEST, final.name + "\n")


def payload_files(folder: Path) -> list[str]:
    """Names of the files that the manifest covers, sorted."""
    return sorted(f.name for f in folder.iterdir() if f.is_file() and f.name not in (MANIFEST, VALIDATION))


def damaged_files(folder: Path, manifest: dict[str, Any], names: Iterable[str], hash_content: bool = True) -> list[str]:
    """One sentence for each of `names` that is missing, truncated or altered."""
    problems = []
    for name in names:
        path = folder / name
        expected = manifest[name]
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected["size"]:
            problems.append(f"{path} has {path.stat().st_size} bytes instead of {expected['size']}")
        elif hash_content and checksum(path)["sha256"] != expected["sha256"]:
            problems.append(f"{path} does not have the checksum it was written with")
    return problems


def read_manifest(folder: Path) -> dict[str, Any]:
    """Size and sha256 of every file of a checkpoint, as they were written.

    Raises:
        ValueError: it is missing or no such table.
    """
    manifest = read_json(folder / MANIFEST)
    if (
        not all(
            isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
            for entry in manifest.values()
        )
        or CONTRACT not in manifest
    ):
        raise ValueError(
            f"{folder / MANIFEST} is damaged: it does not give sizes and checksums; choose another checkpoint."
        )
    return manifest


def check_complete(folder: Path) -> None:
    """Refuse a folder with a file missing or cut short, or an altered description; tensors are compared when loading.

    Raises:
        ValueError: naming the files.
    """
    manifest = read_manifest(folder)
    problems = damaged_files(folder, manifest, manifest, hash_content=False)
    problems = problems or damaged_files(folder, manifest, [name for name in (CONTRACT, STATE) if name in manifest])
    if problems:
        raise ValueError(f"checkpoint {folder} is damaged: {'; '.join(problems)}; choose another checkpoint.")


def is_complete(folder: Path) -> bool:
    """Whether `check_complete` has nothing to say."""
    try:
        check_complete(folder)
    except ValueError:
        return False
    return True


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


def check_identity(folder: Path, model: Any, contract: dict[str, Any] | None = None) -> dict[str, Any]:
    """Refuse a checkpoint of another model or, with `contract`, of another contract; returns its contract.json.

    Raises:
        ValueError: naming the first field that differs, both values, and the remedy.
    """
    stored = read_json(folder / CONTRACT)
    if stored.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONTRACT}: format ({stored.get('format')}) is not {FORMAT}; "
            "convert the checkpoint with the version that wrote it."
        )
    ours = asdict(model)
    for name in IDENTITY:
        if stored["model"].get(name) != ours[name]:
            raise ValueError(
                f"model.{name} ({ours[name]}) differs from the checkpoint {folder} "
                f"({stored['model'].get(name)}); choose the model recipe it was made with."
            )
    for name, value in (contract or {}).items():
        if stored["contract"].get(name) != value:
            raise ValueError(
                f"contract: {name} ({value}) differs from the checkpoint {folder} "
                f"({stored['contract'].get(name)}); continue with the value it was trained with."
            )
    return stored


def check_start(folder: Path, config: Any) -> dict[str, Any]:
    """Refuse weights that the run's first stage would misread; returns the checkpoint's contract.json.

    Autoregressive weights may start any stage. Diffusion weights predict a token at its own place, in blocks counted
    from `block_origin`: another diffusion stage on the same grid continues them.

    Raises:
        ValueError: naming the field, both values and the remedy.
    """
    stored = check_identity(folder, config.model)
    contract = stored["contract"]
    if contract.get("shift", True):
        return stored
    name, first = next(iter(config.schedule.stages.items()))
    if first.objective == "ar":
        raise ValueError(
            f"schedule.stages.{name}.objective (ar) cannot start from the diffusion weights {folder}; "
            "start from an autoregressive checkpoint, or with a diffusion stage."
        )
    check_grid(folder, contract, config.data.block_origin)
    return stored


def check_grid(folder: Path, contract: dict[str, Any], block_origin: str) -> None:
    """Refuse diffusion weights of another block grid.

    Raises:
        ValueError: naming both grids.
    """
    if not contract.get("shift", True) and contract.get("block_origin", block_origin) != block_origin:
        raise ValueError(
            f"data.block_origin ({block_origin}) differs from that of the diffusion weights {folder} "
            f"({contract['block_origin']}); continue with the grid they were trained on."
        )


def read_validation(folder: Path) -> dict[str, Any] | None:
    """Read validation.json, or None where the checkpoint was not evaluated.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / VALIDATION
    if not path.is_file():
        return None
    content = read_json(path)
    for part in ("elbo", "bits_per_byte"):
        values = content.get(part) or {}
        if not isinstance(values, dict) or not all(isinstance(value, (int, float)) for value in values.values()):
            raise ValueError(f"{path} is damaged ({part} holds no numbers); evaluate the checkpoint again.")
    return {"elbo": {}, "bits_per_byte": {}, "target_block_size": None} | {
        name: value for name, value in content.items() if value is not None
    }


def write_validation(folder: Path, content: dict[str, Any]) -> None:
    """Write validation.json of a checkpoint that is there already."""
    write_json(folder / VALIDATION, content, sort_keys=True)


def validation_elbo(folder: Path) -> float | None:
    """ELBO at the target block size in nats per token, or None where the checkpoint was not evaluated."""
    validation = read_validation(folder)
    return validation["elbo"].get(str(validation["target_block_size"])) if validation else None


def clean_temporary(checkpoints: Path) -> list[Path]:
    """Delete what an interrupted writer left behind; returns what was deleted."""
    left = list(checkpoints.glob(f"{TEMPORARY_PREFIX}*")) if checkpoints.is_dir() else []
    for path in left:
        remove(path)
    return left


def _kind(folder: Path) -> tuple[Any, Any]:
    """What a checkpoint was trained for: (shift, block size)."""
    contract = read_json(folder / CONTRACT)["contract"]
    return contract.get("shift"), contract.get("block_size")


def retire(checkpoints: Path, keep_last: int, keep_best: int, keep_every: int) -> list[Path]:
    """Delete checkpoints that no rule keeps; returns the deleted folders.

    Kept: the last `keep_last`, the `keep_best` with the lowest validation ELBO among those trained as the newest
    one (only they can be merged with it), every `keep_every`-th of those saved at the interval, and every stage's
    end. An incomplete folder never counts as one that is kept, so the newest complete checkpoint always stays.
    """
    complete = list_checkpoints(checkpoints)
    kept = set(complete[-max(keep_last, 1) :])
    ranked = []
    for folder in (f for f in complete if _kind(f) == _kind(complete[-1])):
        try:
            elbo = validation_elbo(folder)
        except ValueError as error:
            log.warning("%s stays: %s", folder.name, error)
            kept.add(folder)
            continue
        if elbo is not None and math.isfinite(elbo):
            ranked.append((elbo, folder))
    kept |= {f for _, f in sorted(ranked)[:keep_best]}
    deleted = []
    for folder in complete:
        contract = read_json(folder / CONTRACT)
        number = contract.get("save_number")
        is_multiple = keep_every > 0 and number is not None and number % keep_every == 0
        if folder in kept or is_multiple or contract.get("is_stage_end", False):
            continue
        remove(folder)
        deleted.append(folder)
    return deleted

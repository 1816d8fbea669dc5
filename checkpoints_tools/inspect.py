"""What a checkpoint is, without reading its tensors: `python -m checkpoints_tools.inspect DIR`.

Reads headers only, so a 200 GB folder takes as long as a small one. (The module shares its name with one of
Python's own; it is run as part of its package, never from inside this folder.)
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import json
from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.command import prepare_tool
from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.model_tensors import model_keys
from megatron_dllm.checkpoint.stored_model import open_checkpoint
from megatron_dllm.checkpoint.validation import read_validation, to_json
from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.config_json import read_hf_config
from megatron_dllm.hf.name_table import key_aliases
from megatron_dllm.hf.safetensors_io import SafetensorsFolder

# Part of the model -> what the names of its tensors contain, in either format; the first match counts.
_GROUPS = (
    ("norms", ("norm",)),
    ("embedding", ("embed",)),
    ("head", ("lm_head.", "output_layer.")),
    ("attention", ("attention.", "self_attn.")),
    ("shared experts", (".shared_experts.",)),
    ("experts", (".experts.",)),
    ("router", (".router.", ".mlp.gate.", ".block_sparse_moe.gate.")),
    ("dense MLP", (".mlp.",)),
)


def describe(path: Path) -> dict[str, Any]:
    """Describe a checkpoint of either format.

    Args:
        path: a torch_dist step folder, a run folder (its latest checkpoint) or a Hugging Face folder.

    Returns:
        A dictionary of plain values, in the order in which they are shown.

    Raises:
        ValueError: the folder is neither, or is damaged.
    """
    if folders.is_hf_folder(path):
        return _describe_hf(path)
    return _describe_torch_dist(folders.resolve_checkpoint(path))


def _describe_hf(folder: Path) -> dict[str, Any]:
    source = read_hf_config(folder)
    reader = SafetensorsFolder(folder)
    tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in reader.tensors.items()}
    shards = {tensor.path for tensor in reader.tensors.values()}
    return {
        "folder": str(folder),
        "format": f"Hugging Face, {len(shards)} safetensors file(s)",
        "family": source.model.family,
        **_sizes(source.model, tensors),
        "contract": {
            "shift": not source.is_diffusion,
            "block_size": source.block_size,
            "mask_token_id": source.model.mask_token_id if source.model.mask_token_id >= 0 else None,
        },
        "bytes_on_disk": _bytes_on_disk(folder),
    }


def _describe_torch_dist(folder: Path) -> dict[str, Any]:
    checkpoint, reader = open_checkpoint(folder)
    model, meta, stored = checkpoint.model, checkpoint.meta, reader.metadata.tensors
    keys = model_keys(model, reader)
    tensors = {key: (stored[name].dtype, stored[name].shape) for key, name in keys.items()}
    # Converted checkpoints name some tensors twice.
    others = set(stored) - set(keys.values()) - set(key_aliases(model).values())
    description = {
        "folder": str(folder),
        "format": "torch_dist",
        "family": model.family,
        **_sizes(model, tensors),
        "contract": dict(sorted(asdict(meta.semantics).items())),
        "step": meta.position.step,
        "stage": meta.position.stage,
        "is_stage_end": meta.position.is_stage_end,
        "consumed_tokens": meta.position.consumed_tokens,
        "has_optimizer": bool(others),
        "saved_by": {
            "world_size": meta.provenance.world_size,
            **{name: size for name, size in (meta.provenance.layout or {}).items() if isinstance(size, int)},
        },
        "source": meta.provenance.source,
        "tokenizer": meta.provenance.tokenizer,
        "bytes_on_disk": _bytes_on_disk(folder),
    }
    validation = read_validation(folder)
    return description | ({"validation": to_json(validation)} if validation else {})


def _sizes(model: ModelConfig, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Any]:
    groups: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, (dtype, shape) in tensors.items():
        # The bias chooses experts and is not trained by gradients: not a parameter.
        if not name.endswith("expert_bias"):
            groups[_group(name)] += prod(shape)
        dtypes[str(dtype).removeprefix("torch.")] += prod(shape)
    total = sum(groups.values())
    idle = groups["experts"] * (1 - model.moe_router_topk / model.num_moe_experts) if model.is_moe else 0
    return {
        "num_tensors": len(tensors),
        "parameters": total,
        "active_parameters": round(total - idle),
        "parameters_of": {name: groups[name] for name, _ in _GROUPS if groups[name]},
        "elements_of_dtype": dict(dtypes),
    }


def _group(name: str) -> str:
    return next((group for group, parts in _GROUPS if any(part in name for part in parts)), "other")


def _bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show(description: dict[str, Any]) -> str:
    """Lay a description out for reading."""
    lines: list[str] = []
    for name, value in description.items():
        if name == "validation":
            lines += ["validation", *_validation_rows(value)]
        elif isinstance(value, dict):
            lines += [name, *(f"    {key:24} {_show_value(key, item)}" for key, item in value.items())]
        else:
            lines.append(f"{name:20} {_show_value(name, value)}")
    return "\n".join(lines)


def _show_value(name: str, value: Any) -> str:
    if name == "bytes_on_disk":
        return f"{value / 1e9:,.3f} GB"
    is_count = isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_id")
    return f"{value:,}" if is_count else str(value)


def _validation_rows(validation: dict[str, Any]) -> list[str]:
    bits = validation["bits_per_byte"]
    rows = [f"    {'block size':>10} {'nats/token':>12} {'bits/byte':>12}"]
    for size, value in validation["elbo"].items():
        mark = "  target" if size == str(validation["target_block_size"]) else ""
        rows.append(f"    {size:>10} {value:12.5f} {bits.get(size, float('nan')):12.5f}{mark}")
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="torch_dist checkpoint, run folder or Hugging Face folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    prepare_tool()
    description = describe(arguments.folder)
    print(json.dumps(description, indent=1) if arguments.json else show(description))


if __name__ == "__main__":
    run_command(main)

"""Hugging Face folders with random weights and the right names, for tests and benchmarks."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import torch

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.export_config import to_hf_config
from megatron_dllm.hf.name_table import EACH, is_fp32, weight_map
from megatron_dllm.hf.safetensors_io import MAX_SHARD_BYTES, SafetensorsWriter

_PIECE = 1 << 24


def write_synthetic(
    folder: Path,
    model: ModelConfig,
    architecture: str | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    experts: str = EACH,
) -> None:
    """Write config.json and safetensors; no tokenizer.

    Args:
        folder: to make; must not exist.
        model: sizes.
        architecture: None: the model's family.
        dtype: of everything but expert_bias.
        seed: of the weights.
        max_shard_bytes: of the files.
        experts: how the folder keeps them, see hf/name_table.py.
    """
    folder.mkdir(parents=True)
    architecture = architecture or model.family
    names = weight_map(model, architecture, experts)
    tensors = {name: (torch.float32 if is_fp32(name) else dtype, shape) for name, shape in names.hf_shapes.items()}
    writer = SafetensorsWriter(folder, tensors, max_shard_bytes)
    generator = torch.Generator().manual_seed(seed)
    for name, (kind, shape) in tensors.items():
        # Norms around 1, so that a forward pass stays in a sane range.
        mean = 1.0 if "norm" in name else 0.0
        for start in range(0, prod(shape), _PIECE):
            values = torch.randn(min(_PIECE, prod(shape) - start), generator=generator)
            writer.write(name, start, (values * 0.05 + mean).to(kind))
    writer.close()
    config = to_hf_config(model, architecture, str(dtype).removeprefix("torch."))
    config["mask_token_id"] = model.mask_token_id
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

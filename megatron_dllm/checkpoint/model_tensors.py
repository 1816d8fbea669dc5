"""Which tensors of a torch_dist checkpoint are the model's, and what goes with them."""

from __future__ import annotations

from typing import Any

from megatron_dllm.checkpoint.torch_dist_read import TorchDistReader
from megatron_dllm.checkpoint.torch_dist_write import TorchDistWriter
from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.name_table import extra_state_keys, key_aliases

# Tensors of the model; everything else in a training checkpoint is the optimizer's.
_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")


def model_keys(model: ModelConfig, reader: TorchDistReader) -> dict[str, str]:
    """The model's tensors in a checkpoint, without those of the optimizer.

    Returns:
        {key in the local spec: key under which it is stored}, in the order in which they are stored.
    """
    local = {alias: key for key, alias in key_aliases(model).items()}
    stored = reader.metadata.tensors
    return {
        local.get(key, key): key
        for key in stored
        if key.startswith(_MODEL_PREFIXES) and not (key in local and local[key] in stored)
    }


def finish_tensors(writer: TorchDistWriter, model: ModelConfig) -> dict[str, dict[str, Any]]:
    """After a model's tensors: their other names, megatron-core's empty extra states, and the table of contents.

    Returns:
        Size and sha256 of the files.
    """
    for key, alias in key_aliases(model).items():
        writer.alias(key, alias)
    writer.add_empty_objects(list(extra_state_keys(model)))
    return writer.close()

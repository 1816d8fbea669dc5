"""The tensors of a Hugging Face model folder, matched with the model that its config.json describes.

Everything that reads weights from such a folder opens it here, so that what one accepts all accept.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.name_table import WeightMap, experts_form, weight_map
from megatron_dllm.hf.safetensors_io import SafetensorsFolder, StoredTensor

logger = logging.getLogger(__name__)
HEAD = "lm_head.weight"
# Buffers that old versions of transformers saved: they follow from rope_theta.
_DERIVED = ".rotary_emb.inv_freq"
_COMPARED_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose tensors are those of its model, no more and no fewer.

    Attributes:
        source: reads them.
        names: where each belongs.
        tensors: those that belong to the model, by name.
    """

    source: SafetensorsFolder
    names: WeightMap
    tensors: dict[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Size of the model's tensors on disk."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def open_model_folder(folder: Path, model: ModelConfig) -> ModelFolder:
    """Open a folder and compare its tensors with the model's.

    Experts may be stored one by one, stacked, or fused as transformers 5 does. The head of a tied model may be there
    if it equals the embedding; what is derived from the configuration is passed over.

    Args:
        folder: holds safetensors.
        model: of its config.json.

    Raises:
        ValueError: a file is damaged; a tensor is missing, unknown, or of another shape or kind.
    """
    source = SafetensorsFolder(folder)
    names = weight_map(model, experts=experts_form(source.tensors))
    tensors = {name: tensor for name, tensor in source.tensors.items() if not name.endswith(_DERIVED)}
    if model.tie_word_embeddings and HEAD in tensors:
        _check_tied_head(source, next(iter(names.hf_shapes)))
        del tensors[HEAD]
    _check_names(folder, names, tensors, model.family)
    for name, shape in names.hf_shapes.items():
        _check_tensor(name, tensors[name], shape)
    return ModelFolder(source, names, tensors)


def _check_tied_head(source: SafetensorsFolder, embedding: str) -> None:
    """Refuse a head that is not the embedding which it is tied to."""
    head, tied = source.tensors[HEAD], source.tensors.get(embedding)
    is_same = tied is not None and (head.dtype, head.shape) == (tied.dtype, tied.shape)
    if not is_same or not _is_equal(source, HEAD, embedding):
        raise ValueError(
            f"{head.path}: tensor {HEAD} ({list(head.shape)}) differs from {embedding}, and config.json ties them "
            "(tie_word_embeddings true): set it to false to keep both, or remove the tensor that is wrong."
        )
    logger.info("%s: %s equals %s, as config.json ties them; it is kept once", head.path, HEAD, embedding)


def _is_equal(source: SafetensorsFolder, a: str, b: str) -> bool:
    """Whether two tensors of one shape and dtype are equal bit for bit."""
    tensor = source.tensors[a]
    num_elements, step = prod(tensor.shape), _COMPARED_BYTES // tensor.dtype.itemsize
    for start in range(0, num_elements, step):
        parts = [torch.empty(min(step, num_elements - start), dtype=tensor.dtype) for _ in range(2)]
        for name, part in zip((a, b), parts, strict=True):
            source.read(name, start, part)
        if not torch.equal(parts[0].view(torch.uint8), parts[1].view(torch.uint8)):
            return False
    return True


def _check_names(folder: Path, names: WeightMap, tensors: dict[str, StoredTensor], family: str) -> None:
    missing = [name for name in names.hf_shapes if name not in tensors]
    if missing:
        raise ValueError(
            f"{folder}: tensor {missing[0]} and {len(missing) - 1} more are missing (found "
            f"{len(tensors)} of {len(names.hf_shapes)}); the folder is incomplete or config.json is "
            "another model's."
        )
    extra = [name for name in tensors if name not in names.hf_shapes]
    if extra:
        tensor = tensors[extra[0]]
        raise ValueError(
            f"{tensor.path}: tensor {extra[0]} ({list(tensor.shape)}) and {len(extra) - 1} more are not "
            f"part of a {family} with this config.json; our model has no place for it, so it would be lost."
        )


def _check_tensor(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, config.json asks for "
            f"{list(shape)}; one of the two belongs to another model."
        )
    if not tensor.dtype.is_floating_point:
        raise ValueError(
            f"{tensor.path}: tensor {name} has dtype {tensor.dtype}; "
            "weights must be floating point: dequantize the checkpoint first."
        )

"""The model in a checkpoint: its sizes, what its outputs mean, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dllm.checkpoint.manifest import check_complete
from megatron_dllm.checkpoint.meta import CheckpointMeta, read_meta
from megatron_dllm.checkpoint.typed import read_fields
from megatron_dllm.config import ModelConfig
from megatron_dllm.run.names import CONTRACT

if TYPE_CHECKING:
    from megatron_dllm.checkpoint.torch_dist_read import TorchDistReader

# Training settings that earlier versions kept among the model's fields. They are not part of what the weights mean.
_TRAINING_SETTINGS = (
    "attention_backend",
    "skip_unused_outputs",
    "mask_embedding_noise",
    "mask_embedding_noise_steps",
    "moe_router_bias_update_rate",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
)


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint, without its tensors.

    Attributes:
        folder: of the checkpoint.
        model: sizes and special tokens.
        meta: everything that contract.json says.
    """

    folder: Path
    model: ModelConfig
    meta: CheckpointMeta

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer that the checkpoint names, if it is there."""
        name = self.meta.provenance.tokenizer
        return (self.folder / name).resolve() if name and (self.folder / name).is_dir() else None


def read_stored_model(folder: Path) -> StoredModel:
    """Read contract.json.

    Raises:
        ValueError: it is missing, damaged, of another format, or names a field or size we do not know.
    """
    meta = read_meta(folder)
    place = f"{folder / CONTRACT}: model."
    model = read_fields(ModelConfig, meta.model, place, ignored=_TRAINING_SETTINGS)
    try:
        model.validate()
    except ValueError as error:
        raise ValueError(f"{folder / CONTRACT}: {error}") from None
    return StoredModel(folder, model, meta)


def open_checkpoint(folder: Path) -> tuple[StoredModel, TorchDistReader]:
    """Open a checkpoint whose files are all there, with the sizes they were written with.

    Raises:
        ValueError: naming the file that is missing, truncated or altered.
    """
    # torch takes seconds to import, and the launcher, which reads models alone, need not have it.
    from megatron_dllm.checkpoint.torch_dist_read import TorchDistReader

    stored = read_stored_model(folder)
    check_complete(folder)
    return stored, TorchDistReader(folder)

"""A trained checkpoint on one device, ready to decode: model, tokenizer, and what it was trained for.

Weights come from a torch_dist checkpoint of any layout, or straight from an HF folder, by the same table
that the conversion tools use.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints_tools.hf_config import read_hf_config
from checkpoints_tools.param_map import Piece, weight_map
from checkpoints_tools.safetensors_io import SafetensorsFolder
from checkpoints_tools.tokenizer_files import TokenizerFiles, settle_mask_id
from megatron_dllm import checkpoint_folder as folders
from megatron_dllm import parallel
from megatron_dllm.checkpoint import load_weights
from megatron_dllm.config import GenerateConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_dllm.diffusion.decode import DecodingContract
from megatron_dllm.model.attention.kv_cache import KVCache
from megatron_dllm.model.gpt import DiffusionGPTModel, build_model

log = logging.getLogger(__name__)
HF_CONFIG, TOKENIZER_FILE = "config.json", "tokenizer.json"
# Block sizes at which serving engines decode an architecture whose config.json names none.
SERVED_BLOCK_SIZES = {"llada2_moe": 32, "sdar_moe": 4}


@dataclass(frozen=True)
class Source:
    """What a checkpoint folder says about itself, before anything large is read.

    Attributes:
        folder: the HF folder or the torch_dist checkpoint.
        is_hf: which of the two.
        model: sizes and special tokens.
        block_size: tokens it was trained to denoise together.
        tokenizer: file `tokenizer.json`.
    """

    folder: Path
    is_hf: bool
    model: ModelConfig
    block_size: int
    tokenizer: Path


@dataclass(frozen=True)
class Decoder:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        contract: block grid, context and special tokens.
    """

    model: DiffusionGPTModel
    tokenizer: Tokenizer
    contract: DecodingContract
    device: torch.device

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as in training: no special token is added.

        Raises:
            ValueError: the tokenizer knows tokens that the model does not have.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        vocab_size = self.model.model_config.vocab_size
        if ids and max(ids) >= vocab_size:
            raise ValueError(f"prompt has token {max(ids)}, the model's vocabulary ends at {vocab_size - 1}; "
                             "name the tokenizer that belongs to the checkpoint.")
        return ids

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def forward(self) -> CachedForward:
        """A pass for one prompt, with an empty cache."""
        return CachedForward(self.model)


class CachedForward:
    """The `diffusion.decode.Forward` of a megatron model: committed tokens live in a `KVCache`."""

    def __init__(self, model: DiffusionGPTModel) -> None:
        self._model = model
        self._cache = KVCache()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, position_ids: Tensor, roles: Tensor, commit: bool) -> Tensor | None:
        """See `diffusion.decode.Forward`; a commit skips the head."""
        num_logits = 0 if commit else input_ids.numel()
        positions = torch.arange(num_logits, device=input_ids.device)
        with self._cache.attached(self._model, is_committing=commit):
            logits = self._model.logits(input_ids, position_ids, roles, positions)
        return None if commit else logits.view(*input_ids.shape, -1)


def read_source(config: GenerateConfig) -> Source:
    """Find out what `config.checkpoint` is.

    Raises:
        ValueError: it is no checkpoint, or one that does not decode block by block.
    """
    path = Path(config.checkpoint)
    if not path.is_dir():
        raise ValueError(f"checkpoint ({path}) is not a folder; give an HF folder, a run folder or a step_* folder.")
    if (path / HF_CONFIG).is_file():
        source = _read_hf(path, config.tokenizer)
    else:
        source = _read_torch_dist(folders.resolve_checkpoint(path), config.tokenizer)
    if config.context_length is not None and config.context_length > source.model.max_position_embeddings:
        raise ValueError(f"context_length ({config.context_length}) must not exceed the model's "
                         f"max_position_embeddings ({source.model.max_position_embeddings}).")
    return source


def _read_torch_dist(folder: Path, tokenizer: str | None) -> Source:
    stored = folders.read_json(folder / folders.CONTRACT)
    known = {field.name for field in fields(ModelConfig)}
    unknown = sorted(set(stored["model"]) - known)
    if stored.get("format") != folders.FORMAT or unknown:
        raise ValueError(f"{folder / folders.CONTRACT} (format {stored.get('format')}, unknown fields {unknown}) is not "
                         f"of format {folders.FORMAT}; use the version that wrote it.")
    contract = stored["contract"]
    if contract["shift"]:
        raise ValueError(f"{folder}: contract.shift (true) means that it predicts the next token, autoregressively; "
                         "convert it with megatron_dllm.train before decoding blocks.")
    beside = stored.get("tokenizer")
    return Source(folder, False, ModelConfig(**stored["model"]), contract["block_size"],
                  _find_tokenizer(folder / beside if beside else None, tokenizer))


def _read_hf(folder: Path, tokenizer: str | None) -> Source:
    stored = read_hf_config(folder)
    model = stored.model
    if not stored.is_diffusion:
        raise ValueError(f"{folder}: model_type ({model.family}) predicts the next token, autoregressively; convert it with "
                         f"hf_to_mcore and megatron_dllm.train, or name a folder of {' or '.join(SERVED_BLOCK_SIZES)}.")
    files = TokenizerFiles(folder)
    eos = model.eos_token_id if model.eos_token_id >= 0 else files.eos_id()
    if eos is None:
        raise ValueError(f"{folder}: eos_token_id is neither in {HF_CONFIG} nor in the tokenizer; add it to {HF_CONFIG}.")
    model = replace(model, mask_token_id=settle_mask_id(files, model.vocab_size, model.mask_token_id, None),
                    eos_token_id=eos, pad_token_id=model.pad_token_id if model.pad_token_id >= 0 else eos)
    model.validate()
    return Source(folder, True, model, stored.block_size or SERVED_BLOCK_SIZES[model.family],
                  _find_tokenizer(folder, tokenizer))


def _find_tokenizer(beside: Path | None, asked: str | None) -> Path:
    """tokenizer.json of the folder that was asked for, or else of the one beside the weights."""
    folder = Path(asked) if asked is not None else beside
    if folder is None:
        raise ValueError("tokenizer (null) must name a folder: the checkpoint was trained without one.")
    if not (folder / TOKENIZER_FILE).is_file():
        raise ValueError(f"tokenizer ({folder}) has no {TOKENIZER_FILE}; name a folder that has one.")
    return folder / TOKENIZER_FILE


@contextmanager
def single_rank(seed: int) -> Iterator[None]:
    """Process groups of one rank, unless the caller has started groups already."""
    if parallel_state.model_parallel_is_initialized():
        yield
        return
    parallel.initialize(ParallelConfig(), RunConfig(name="generate", seed=seed))
    try:
        yield
    finally:
        parallel.destroy()


def load_decoder(config: GenerateConfig, source: Source) -> Decoder:
    """Build the model on this process's device and load its weights; process groups must exist.

    Raises:
        ValueError: weights are missing, or do not fit the model.
    """
    precision = config.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    layout = ParallelConfig(precision=precision)
    model = build_model(source.model, layout, pre_process=True, post_process=True,
                        attention_backend=config.attention_backend)
    if source.is_hf:
        load_hf_weights(source.folder, model)
    else:
        load_weights(source.folder, [model])
    contract = DecodingContract(
        block_size=config.block_size or source.block_size,
        context_length=config.context_length or source.model.max_position_embeddings,
        mask_token_id=source.model.mask_token_id, eos_token_ids=(source.model.eos_token_id,))
    if contract.block_size != source.block_size:
        log.info("block_size %d; the checkpoint was trained at %d", contract.block_size, source.block_size)
    device = next(model.parameters()).device
    return Decoder(model.eval(), Tokenizer.from_file(str(source.tokenizer)), contract, device)


def load_hf_weights(folder: Path, model: DiffusionGPTModel) -> None:
    """Copy the tensors of an HF folder into a model of any layout; every rank reads what it holds.

    Args:
        folder: config.json and safetensors.
        model: as built, its precision stays.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    sizes = model.model_config
    source = SafetensorsFolder(folder)
    has_stacked_experts = any(name.endswith(".mlp.experts.gate_proj") for name in source.tensors)
    table = weight_map(sizes, has_stacked_experts=has_stacked_experts)
    stored = {name: tensor.shape for name, tensor in source.tensors.items()}
    differing = sorted(name for name in stored.keys() | table.hf_shapes.keys()
                       if stored.get(name) != table.hf_shapes.get(name))
    if differing:
        name = differing[0]
        raise ValueError(f"{folder}: {len(differing)} tensors do not fit its {HF_CONFIG}; {name} is {stored.get(name)}, "
                         f"expected {table.hf_shapes.get(name)}. The folder is of another model, or incomplete.")
    targets: dict[str, list[ShardedTensor]] = defaultdict(list)
    state = model.sharded_state_dict()
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            targets[value.key].append(value)
    num_missing = sum(target.data.numel() for parts in targets.values() for target in parts)
    with torch.no_grad():
        for piece in table.pieces:
            num_missing -= _copy_piece(source, piece, targets[piece.mcore_key])
    source.close()
    assert num_missing == 0, f"{num_missing} elements of the model have no counterpart in the weight map"


def _copy_piece(source: SafetensorsFolder, piece: Piece, targets: list[ShardedTensor]) -> int:
    """Copy one piece into the parts of its tensor that this rank holds; returns the number of elements."""
    values = torch.empty(piece.num_elements, dtype=source.tensors[piece.hf_name].dtype)
    source.read(piece.hf_name, piece.hf_start, values)
    values = values.view(piece.sizes)
    num_copied = 0
    for target in targets:
        data = target.data.view((1,) * target.prepend_axis_num + tuple(target.local_shape))
        box = [(max(a, b), min(a + n, b + m)) for a, n, b, m in
               zip(piece.offsets, piece.sizes, target.global_offset, data.shape, strict=True)]
        if all(low < high for low, high in box):
            there = tuple(slice(low - start, high - start)
                          for (low, high), start in zip(box, target.global_offset, strict=True))
            here = tuple(slice(low - start, high - start) for (low, high), start in zip(box, piece.offsets, strict=True))
            data[there].copy_(values[here])
            num_copied += data[there].numel()
    return num_copied

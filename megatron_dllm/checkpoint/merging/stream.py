"""The streamed mean: a piece of every input at a time, read ahead of the writing."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megatron_dllm.checkpoint.comparing import compared
from megatron_dllm.checkpoint.manifest import write_manifest
from megatron_dllm.checkpoint.merging.averaging import weighted_mean
from megatron_dllm.checkpoint.merging.inputs import HFInput, MergeInput, TorchDistInput
from megatron_dllm.checkpoint.meta import Provenance, write_meta
from megatron_dllm.checkpoint.model_card import PROVENANCE, merge_card
from megatron_dllm.checkpoint.model_tensors import finish_tensors
from megatron_dllm.checkpoint.output_folder import output_folder
from megatron_dllm.checkpoint.streaming import Task, check_finite, run, split_rows
from megatron_dllm.checkpoint.torch_dist_write import TorchDistWriter
from megatron_dllm.hf.safetensors_io import SafetensorsWriter
from megatron_dllm.hf.serving import DLLM_CONFIG
from megatron_dllm.hf.tokenizer_folder import GENERATION_FILE, TOKENIZER_FILES, tokenizer_files
from megatron_dllm.run.files import copy_files, refuse_dead_link, write_json, write_text
from megatron_dllm.run.names import TOKENIZER

# Of a Hugging Face folder: what belongs to the model beside its weights and its history.
_COPIED = ("config.json", GENERATION_FILE, *TOKENIZER_FILES, "*.py", DLLM_CONFIG, "LICENSE*")
# Per input; all inputs' pieces are in memory at once.
_PIECE_BYTES = 16 * 1024**2
# One waits for the disk while the other averages.
_NUM_READERS = 2


def merge_into(inputs: list[MergeInput], weights: list[float], output: Path, provenance: dict[str, Any]) -> None:
    """Write the weighted mean of alike inputs.

    Args:
        inputs: checked by `check_alike`.
        weights: one each.
        output: folder to make; must not exist.
        provenance: written beside the weights.
    """
    total_bytes = sum(prod(shape) * dtype.itemsize for dtype, shape in inputs[0].tensors.values())
    with output_folder(output, total_bytes) as temporary:
        if isinstance(inputs[0], HFInput):
            _merge_hf(cast(list[HFInput], inputs), weights, temporary, total_bytes, provenance)
            write_text(temporary / "README.md", merge_card(output.name, provenance))
        else:
            _merge_torch_dist(cast(list[TorchDistInput], inputs), weights, temporary, total_bytes, provenance)


def _merge_hf(
    inputs: list[HFInput], weights: list[float], folder: Path, total_bytes: int, provenance: dict[str, Any]
) -> None:
    last = inputs[-1]
    # Whatever may be refused comes before the weights, which take hours.
    for path in sorted({path for pattern in _COPIED for path in last.folder.glob(pattern)}):
        refuse_dead_link(path)
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    write_json(folder / PROVENANCE, provenance)
    writer = SafetensorsWriter(folder, last.tensors)
    mean = _Mean(inputs, weights)
    try:
        run(
            mean.tasks(
                {name: [((0,) * len(shape), shape)] for name, (_, shape) in last.tensors.items()},
                lambda name, first, offsets, sizes: partial(writer.write, name, first),
            ),
            total_bytes,
            "merge",
            _NUM_READERS,
        )
        writer.close()
    finally:
        writer.abandon()


def _merge_torch_dist(
    inputs: list[TorchDistInput], weights: list[float], folder: Path, total_bytes: int, provenance: dict[str, Any]
) -> None:
    last = inputs[-1]
    tokenizer, meta = last.stored.tokenizer, last.stored.meta
    if tokenizer is not None:
        copy_files(tokenizer_files(tokenizer), folder / TOKENIZER)
    provenance_of_mean = Provenance(tokenizer=TOKENIZER if tokenizer else None, source=meta.provenance.source)
    position = replace(meta.position, is_stage_end=False)
    write_meta(folder, replace(meta, position=position, provenance=provenance_of_mean))
    write_json(folder / PROVENANCE, provenance, sort_keys=True)
    writer = TorchDistWriter(folder)
    mean = _Mean(inputs, weights)
    boxes = {
        key: [(chunk.offsets, chunk.sizes) for chunk in last.reader.metadata.tensors[name].chunks]
        for key, name in last.keys.items()
    }
    try:
        for key in boxes:
            writer.add(key, *last.tensors[key])
        tasks = mean.tasks(boxes, lambda key, first, offsets, sizes: partial(_write_box, writer, key, offsets, sizes))
        with compared([item.folder for item in inputs]):
            run(tasks, total_bytes, "merge", _NUM_READERS)
        checksums = finish_tensors(writer, last.stored.model)
    finally:
        writer.abandon()
    write_manifest(folder, checksums)


def _write_box(
    writer: TorchDistWriter, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], data: Tensor
) -> None:
    writer.write(key, offsets, data.view(sizes))


class _Mean:
    """Reads a piece of every input, all at once, and averages it."""

    def __init__(self, inputs: list[Any], weights: list[float]) -> None:
        self._inputs = inputs
        self._weights = weights
        self._own = threading.local()
        self._readers = ThreadPoolExecutor(len(inputs))

    def tasks(self, boxes: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]], writer_of: Any) -> Iterator[Task]:
        """One task per piece.

        Args:
            boxes: (offsets, sizes) that together cover every tensor.
            writer_of: called with name, first element, offsets and sizes of a piece; returns what takes it.
        """
        for name, parts in boxes.items():
            dtype = self._inputs[0].tensors[name][0]
            for box_offsets, box_sizes in parts:
                for first, offsets, sizes in split_rows(box_offsets, box_sizes, _PIECE_BYTES // dtype.itemsize):
                    yield Task(
                        name,
                        prod(sizes),
                        dtype,
                        partial(self._read, name, first, offsets, sizes),
                        writer_of(name, first, offsets, sizes),
                    )

    def _read(self, name: str, first: int, offsets: tuple[int, ...], sizes: tuple[int, ...], out: Tensor) -> None:
        num_bytes = out.numel() * out.dtype.itemsize
        staging = getattr(self._own, "staging", torch.empty(0, dtype=torch.uint8))
        if staging.numel() < num_bytes * len(self._inputs):
            staging = self._own.staging = torch.empty(num_bytes * len(self._inputs), dtype=torch.uint8)
        parts = [
            staging[number * num_bytes : (number + 1) * num_bytes].view(out.dtype)
            for number in range(len(self._inputs))
        ]
        list(self._readers.map(lambda item, part: item.read(name, first, offsets, sizes, part), self._inputs, parts))
        weighted_mean(parts, self._weights, out)
        low, high = torch.aminmax(out)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            for item, part in zip(self._inputs, parts, strict=True):
                check_finite(part, f"{item.folder}: {name}")

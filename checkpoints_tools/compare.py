"""Compare two checkpoints tensor by tensor, across formats: `python -m checkpoints_tools.compare A B`.

Exit code 0: every tensor is there in both and equal; 1: something differs; 2: an input cannot be read.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.command import prepare_tool, whole_number
from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.comparing import compared
from megatron_dllm.checkpoint.merging.inputs import HFInput, MergeInput, TensorTable, TorchDistInput, open_input
from megatron_dllm.checkpoint.streaming import split_rows
from megatron_dllm.hf.config_json import read_hf_config
from megatron_dllm.hf.name_table import experts_form, weight_map

_PIECE_BYTES = 32 * 1024**2
Read = Callable[[Tensor], None]


@dataclass
class Difference:
    """How one tensor differs: absolute differences in fp64."""

    name: str
    largest: float = 0.0
    total: float = 0.0
    num_elements: int = 0
    num_not_finite: int = 0

    @property
    def mean(self) -> float:
        """Mean absolute difference over the elements that are finite in both."""
        return self.total / max(self.num_elements - self.num_not_finite, 1)

    @property
    def is_equal(self) -> bool:
        """Whether all elements are equal."""
        return self.largest == 0.0 and self.num_not_finite == 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Count a piece [n] of both sides. NaN equals NaN, an infinity itself."""
        self.num_elements += a.numel()
        if a.dtype == b.dtype and torch.equal(a, b):
            return  # the usual case, at a tenth of the cost
        difference = (a.double() - b.double()).abs()
        is_same = (a == b) | (torch.isnan(a) & torch.isnan(b))
        difference = torch.where(is_same, 0.0, difference)
        is_finite = torch.isfinite(difference)
        self.num_not_finite += int((~is_finite).sum())
        difference = torch.where(is_finite, difference, 0.0)
        self.largest = max(self.largest, float(difference.max()))
        self.total += float(difference.sum())


@dataclass
class Comparison:
    """Everything that differs between A and B."""

    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    values: list[Difference] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        """Same tensors, shapes, dtypes and values."""
        return not (self.only_a or self.only_b or self.shapes or self.dtypes) and all(d.is_equal for d in self.values)


@dataclass(frozen=True)
class _Unit:
    """A piece of one tensor on both sides."""

    name: str
    num_elements: int
    read_a: Read
    read_b: Read


def compare(a: Path, b: Path) -> Comparison:
    """Compare two folders of either format.

    Args:
        a: torch_dist step folder, run folder (its latest checkpoint) or Hugging Face folder.
        b: another.

    Raises:
        ValueError: one of them cannot be read, or is not as it was written.
    """
    side_a, side_b = _open(a), _open(b)
    try:
        if type(side_a) is type(side_b):
            tables, units = _same_format(side_a, side_b)
        elif isinstance(side_a, TorchDistInput):
            assert isinstance(side_b, HFInput)
            tables, units = _across(side_a, side_b, is_swapped=False)
        else:
            assert isinstance(side_a, HFInput) and isinstance(side_b, TorchDistInput)
            tables, units = _across(side_b, side_a, is_swapped=True)
        with compared([side.folder for side in (side_a, side_b) if isinstance(side, TorchDistInput)]):
            return _compare(*tables, units)
    finally:
        side_a.close()
        side_b.close()


def _open(path: Path) -> MergeInput:
    return open_input(path if folders.is_hf_folder(path) else folders.resolve_checkpoint(path), "auto")


def _same_format(a: MergeInput, b: MergeInput) -> tuple[tuple[TensorTable, TensorTable], Iterator[_Unit]]:
    def units() -> Iterator[_Unit]:
        for name, (dtype, shape) in a.tensors.items():
            if b.tensors.get(name, (dtype, ()))[1] == shape:
                for first, offsets, sizes in split_rows((0,) * len(shape), shape, _PIECE_BYTES // dtype.itemsize):
                    yield _Unit(
                        name,
                        prod(sizes),
                        partial(a.read, name, first, offsets, sizes),
                        partial(b.read, name, first, offsets, sizes),
                    )

    return (a.tensors, b.tensors), units()


def _across(
    dist: TorchDistInput, hf: HFInput, is_swapped: bool
) -> tuple[tuple[TensorTable, TensorTable], Iterator[_Unit]]:
    """A torch_dist checkpoint beside a Hugging Face folder, in the names of the latter."""
    model = dist.stored.model
    names = weight_map(model, read_hf_config(hf.folder).model.family, experts_form(hf.tensors))
    pieces = [
        piece
        for piece in names.pieces
        if dist.tensors.get(piece.mcore_key, (None, ()))[1] == names.mcore_shapes[piece.mcore_key]
    ]
    table = {piece.hf_name: (dist.tensors[piece.mcore_key][0], names.hf_shapes[piece.hf_name]) for piece in pieces}
    table |= {key: entry for key, entry in dist.tensors.items() if key not in names.mcore_shapes}

    def units() -> Iterator[_Unit]:
        for piece in pieces:
            if hf.tensors.get(piece.hf_name, (None, ()))[1] != names.hf_shapes[piece.hf_name]:
                continue
            for first, offsets, sizes in split_rows(piece.offsets, piece.sizes, _PIECE_BYTES // 4):
                ours = partial(dist.read, piece.mcore_key, first, offsets, sizes)
                theirs = partial(hf.read, piece.hf_name, piece.hf_start + first, offsets, sizes)
                yield _Unit(piece.hf_name, prod(sizes), *((theirs, ours) if is_swapped else (ours, theirs)))

    return ((hf.tensors, table) if is_swapped else (table, hf.tensors)), units()


def _compare(table_a: TensorTable, table_b: TensorTable, units: Iterator[_Unit]) -> Comparison:
    result = Comparison(
        only_a=[name for name in table_a if name not in table_b],
        only_b=[name for name in table_b if name not in table_a],
    )
    for name in (name for name in table_a if name in table_b):
        (dtype_a, shape_a), (dtype_b, shape_b) = table_a[name], table_b[name]
        if shape_a != shape_b:
            result.shapes.append(f"{name}: {list(shape_a)} in A, {list(shape_b)} in B")
        if dtype_a != dtype_b:
            result.dtypes.append(f"{name}: {dtype_a} in A, {dtype_b} in B")
    differences: dict[str, Difference] = {}
    total = sum(prod(shape) for _, shape in table_a.values())
    with tqdm(total=total, desc="compare", unit="el", unit_scale=True, disable=None) as bar:
        for unit in units:
            piece_a = torch.empty(unit.num_elements, dtype=table_a[unit.name][0])
            piece_b = torch.empty(unit.num_elements, dtype=table_b[unit.name][0])
            unit.read_a(piece_a)
            unit.read_b(piece_b)
            differences.setdefault(unit.name, Difference(unit.name)).add(piece_a, piece_b)
            bar.update(unit.num_elements)
    result.values = sorted(differences.values(), key=lambda item: (-item.num_not_finite, -item.largest, item.name))
    return result


def show(result: Comparison, limit: int) -> str:
    """Lay a comparison out for reading, at most `limit` lines of a kind."""
    lines: list[str] = []
    for title, entries in (
        ("only in A", result.only_a),
        ("only in B", result.only_b),
        ("other shape", result.shapes),
        ("other dtype", result.dtypes),
    ):
        if entries:
            lines += [f"{title}: {len(entries)}", *(f"    {entry}" for entry in entries[:limit])]
    differing = [item for item in result.values if not item.is_equal]
    lines.append(f"values: {len(result.values) - len(differing)} tensors equal, {len(differing)} different")
    if differing:
        lines.append(f"    {'largest':>12} {'mean':>12} {'not finite':>11}  tensor")
        lines += [
            f"    {item.largest:12.5g} {item.mean:12.5g} {item.num_not_finite:11d}  {item.name}"
            for item in differing[:limit]
        ]
    lines.append("equal" if result.is_equal else "different")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--limit", type=whole_number(0), default=20, help="lines of every kind (default 20)")
    arguments = parser.parse_args()
    prepare_tool()
    result = compare(arguments.a, arguments.b)
    print(show(result, arguments.limit))
    return 0 if result.is_equal else 1


if __name__ == "__main__":
    run_command(main)

"""FlexAttention on CUDA: one block-sparse kernel, its tiles computed from the roles in closed form.

With sorted keys a query sees at most two intervals of them (see `plan`). Their ends are all that the kernel's
mask reads, and the tiles follow by counting, in O(row + tiles) without a host synchronisation; torch's own
create_block_mask looks at every pair. All shapes are those of the row, so there is one compilation per shape.

    1 find    the two intervals of keys that each query sees: its own block, and the clean blocks before it
    2 merge   intervals that touch into one
    3 count   for each tile of queries and tile of keys, how many queries touch the tile, and how many cover all of it
    4 list    tiles that every query covers (no mask is read there), and tiles that some query touches (masked)

Of random pairs (`random_pairs`) the kernel draws each in the tiles that some query touches, and no tile is full.

Tiles of 4: queries that see the keys [0, 6), [0, 6), [0, 8), [0, 8) touch tiles 0 and 1 four times each. They cover
tile 0 four times, so it is full, and tile 1 twice, so it is partial; the kernel never visits tile 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_dllm.model.attention import dense
from megatron_dllm.model.attention.plan import PADDING_CODE, find_intervals
from megatron_dllm.model.attention.random_pairs import PLACE, RandomPairs, is_open

IS_COMPILED_PER_SHAPE = True
TILE_SIZE = 128
MAX_SHAPES = 64
# The kernel's own tiles on a Hopper GPU with heads of 128 in 16 bits: on an H100, 4 to 12 % faster than torch's choice,
# forward and backward together.
HOPPER_OPTIONS = {
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 64,
    "fwd_num_warps": 4,
    "fwd_num_stages": 3,
    "bwd_BLOCK_M1": 64,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 64,
    "bwd_num_warps": 4,
    "bwd_num_stages": 2,
}
# Relative norm by which `check_gradients` lets fp32 differ.
FP32_TOLERANCE = 1e-5
# Behind every place in a document.
_LAST_PLACE = 2**31 - 1
# (row, head, query, key) -> whether the query sees the key, of sorted tokens.
ElementMask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# (query, key, value, block mask, scale) of sorted tokens that fill whole tiles -> output.
Kernel = Callable[[Tensor, Tensor, Tensor, BlockMask, float], Tensor]


@dataclass(frozen=True)
class FlexPlan:
    """The kernel's mask, and the orders of the tokens it is written in.

    Attributes:
        block_mask: over sorted queries and keys, both padded to whole tiles.
        sees_key: [b, 1, q, 1] bool over the queries in their own order.
        query_order: [b, q] int64, the query at each sorted place; None: sorted already.
        key_order: [b, k] int64, the key at each sorted place; None: sorted already.
    """

    block_mask: BlockMask
    sees_key: Tensor
    query_order: Tensor | None
    key_order: Tensor | None


def build_plan(
    query_roles: Tensor, key_roles: Tensor, tile_size: int = TILE_SIZE, pairs: RandomPairs | None = None
) -> FlexPlan:
    """The mask of roles [b, q, 3] and [b, k, 3].

    Where queries and keys are the same tensor, CUDA rows must be sorted as `data.batch` lays them out: finding
    out would stall the device, so a device-side assertion guards it. Other tokens are sorted.

    Args:
        query_roles: [b, q, 3] int32; with `pairs` [b, q, 5], places and documents' numbers behind the roles.
        key_roles: [b, k, 3] int32, or [b, k, 5].
        tile_size: edge of a tile.
        pairs: of the visible ones these alone; None: all.
    """
    found = find_intervals(query_roles, key_roles)
    if query_roles.is_cuda and query_roles is key_roles:
        torch._assert_async(
            found.is_sorted,
            "attention: rows must be laid out document by document as [view 1][view 2]..[clean], padding last",
        )
        is_sorted = True
    else:
        is_sorted = not query_roles.is_cuda and query_roles is key_roles and bool(found.is_sorted)
    # Steps 1 and 2, in the order in which the queries came; step 3 wants them sorted.
    ranges = _merge_intervals(found.own_start, found.own_stop, found.clean_start, found.clean_stop)
    is_empty = (ranges[0] >= ranges[1]) & (ranges[2] >= ranges[3])
    sees_key = ~is_empty & (found.query_codes != PADDING_CODE)
    query_order = None
    if not is_sorted:
        query_order = torch.argsort(found.query_codes, dim=-1, stable=True)
        ranges = ranges.gather(2, query_order.expand(4, -1, -1))
    key_order = None if is_sorted else found.key_order
    element = None
    if pairs is not None:
        # A query that sees nothing gets a key all the same, see `build_block_mask`.
        place = torch.where(sees_key, query_roles[..., PLACE], _LAST_PLACE)
        place, of_query = _whole_tiles([place, pairs.of_query(query_roles)], query_order, tile_size)
        key_place, of_key = _whole_tiles([key_roles[..., PLACE], pairs.of_key(key_roles)], key_order, tile_size)
        limit = torch.full((len(place),), pairs.limit, device=place.device)
        element = _pair_mask(place, of_query, key_place, of_key, limit)
    return FlexPlan(
        block_mask=build_block_mask(ranges, key_roles.shape[1], tile_size, element),
        sees_key=sees_key[:, None, :, None],
        query_order=query_order,
        key_order=key_order,
    )


def _whole_tiles(columns: list[Tensor], order: Tensor | None, tile_size: int) -> list[Tensor]:
    """Integers [b, s] of the tokens in the order [b, s] of the plan, filled up to whole tiles with _LAST_PLACE."""
    ordered = columns if order is None else [column.gather(1, order) for column in columns]
    return [F.pad(column, (0, -column.shape[1] % tile_size), value=_LAST_PLACE).contiguous() for column in ordered]


def _pair_mask(query_place: Tensor, of_query: Tensor, key_place: Tensor, of_key: Tensor, limit: Tensor) -> ElementMask:
    """The element mask of random pairs; its arguments are read by the kernel, so that no step compiles anew.

    Args:
        query_place: [b, q] int32.
        of_query: [b, q] int64.
        key_place: [b, k] int32.
        of_key: [b, k] int64.
        limit: [b] int64.
    """

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        places = query_place[b, query], key_place[b, key]
        return is_open(*places, of_query[b, query], of_key[b, key], limit[b])

    return mask_mod


def _merge_intervals(own_start: Tensor, own_stop: Tensor, clean_start: Tensor, clean_stop: Tensor) -> Tensor:
    """[4, b, q] int32 starts and stops; intervals that touch become one, so that a tile inside both is full."""
    has_both = (own_start < own_stop) & (clean_start < clean_stop)
    is_behind = has_both & (clean_stop == own_start)
    is_before = has_both & (own_stop == clean_start)
    merged = torch.stack(
        [
            torch.where(is_behind, clean_start, own_start),
            torch.where(is_before, clean_stop, own_stop),
            torch.where(is_behind | is_before, 0, clean_start),
            torch.where(is_behind | is_before, 0, clean_stop),
        ]
    )
    return merged.int()


def build_block_mask(ranges: Tensor, num_keys: int, tile_size: int, element: ElementMask | None = None) -> BlockMask:
    """Tiles and element mask of queries that see at most two intervals of keys; no host synchronisation.

    Args:
        ranges: [4, b, q] int32 (start, stop, start, stop) of each query's intervals, disjoint.
        num_keys: number of keys.
        tile_size: edge of a tile.
        element: what else a query's keys have to fulfil, of places that fill whole tiles; None: nothing.

    Returns:
        The mask over q and num_keys rounded up to whole tiles. A query that sees nothing gets the key at its own
        place (softmax over nothing has no gradient that kernels agree on); its output is to be discarded.
    """
    query_tiles, key_tiles = -(-ranges.shape[2] // tile_size), -(-num_keys // tile_size)
    ranges = F.pad(ranges, (0, query_tiles * tile_size - ranges.shape[2]))
    place = torch.arange(ranges.shape[2], device=ranges.device, dtype=torch.int32).clamp(max=num_keys - 1)
    sees_none = (ranges[0] >= ranges[1]) & (ranges[2] >= ranges[3])
    ranges = torch.stack(
        [torch.where(sees_none, place, ranges[0]), torch.where(sees_none, place + 1, ranges[1]), ranges[2], ranges[3]]
    )
    # Step 3. Touched: tiles from the one with the first key to the one with the last. Covered: whole tiles between.
    starts, stops = ranges[0::2], ranges[1::2]
    touched = _count_covering(starts // tile_size, -(-stops // tile_size), starts < stops, tile_size, key_tiles)
    inside = _count_covering(-(-starts // tile_size), stops // tile_size, starts < stops, tile_size, key_tiles)
    # Step 4. Merged intervals are apart, so no tile is covered by both intervals of one query.
    is_full = (inside == tile_size) if element is None else torch.zeros_like(inside, dtype=torch.bool)
    partial_num, partial_indices = _list_tiles((touched > 0) & ~is_full)
    full_num, full_indices = _list_tiles(is_full)
    return BlockMask.from_kv_blocks(
        partial_num,
        partial_indices,
        full_num,
        full_indices,
        BLOCK_SIZE=tile_size,
        mask_mod=_both(_interval_mask(*(tensor.contiguous() for tensor in ranges)), element),
        seq_lengths=(query_tiles * tile_size, key_tiles * tile_size),
    )


def _both(first: ElementMask, second: ElementMask | None) -> ElementMask:
    """Pairs that both masks show."""
    if second is None:
        return first

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return first(b, h, query, key) & second(b, h, query, key)

    return mask_mod


def _interval_mask(start_1: Tensor, stop_1: Tensor, start_2: Tensor, stop_2: Tensor) -> ElementMask:
    """The element mask; each tensor [b, q] int32."""

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((key >= start_1[b, query]) & (key < stop_1[b, query])) | (
            (key >= start_2[b, query]) & (key < stop_2[b, query])
        )

    return mask_mod


def _count_covering(first: Tensor, last: Tensor, is_used: Tensor, tile_size: int, key_tiles: int) -> Tensor:
    """How many intervals [2, b, q] of the queries of a tile cover each tile of keys from `first` to before `last`.

    Returns:
        [b, query tiles, key tiles] int32.
    """
    # A line of tiles for each tile of queries: +1 where an interval begins, -1 behind its end. The running sum along
    # the line is the count; e.g. intervals [0, 2) and [1, 3) give +1 +1 -1 -1, so 1 2 1 0.
    is_used = (is_used & (first < last)).int().flatten(2)
    rows, queries = first.shape[1:]
    query_tiles = queries // tile_size
    change = torch.zeros(rows, query_tiles * (key_tiles + 1), dtype=torch.int32, device=first.device)
    line = torch.arange(queries, device=first.device) // tile_size * (key_tiles + 1)
    for interval in range(2):
        change.scatter_add_(1, line + first[interval].clamp(max=key_tiles), is_used[interval])
        change.scatter_add_(1, line + last[interval].clamp(max=key_tiles), -is_used[interval])
    return change.unflatten(1, (query_tiles, key_tiles + 1)).cumsum(-1, dtype=torch.int32)[..., :-1]


def _list_tiles(is_listed: Tensor) -> tuple[Tensor, Tensor]:
    """[b, r, c] bool to the number of marked columns [b, 1, r] and the columns [b, 1, r, c], marked ones first."""
    # A stable sort of the marks puts the marked columns in front, in their order, without knowing how many there are.
    order = torch.argsort(is_listed.int(), dim=-1, descending=True, stable=True).int()
    return is_listed.sum(-1, dtype=torch.int32).unsqueeze(1), order.unsqueeze(1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Compiled once a shape; fullgraph, because uncompiled flex_attention builds the whole score matrix."""
    # Training, evaluation and decoding bring more shapes than torch's default limit of 8 recompilations.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_SHAPES)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def run_compiled(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """The kernel, compiled once a shape: the output [b, n, q, d] of sorted tokens that fill whole tiles.

    Args:
        query: [b, n, q, d].
        key: [b, g, k, d].
        value: [b, g, k, d].
        block_mask: over q and k.
        scale: factor on the logits.

    Raises:
        ValueError: on CPU where gradients are asked for.
    """
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if needs_grad and query.device.type == "cpu":
        raise ValueError("attention_backend (flex) has no backward on the CPU; use shared_prefix or auto.")
    is_grouped = query.shape[1] != key.shape[1]
    options = kernel_options(query)
    return _compiled()(
        query, key, value, block_mask=block_mask, scale=scale, enable_gqa=is_grouped, kernel_options=options
    )


def kernel_options(query: Tensor) -> dict[str, int] | None:
    """The kernel's tiles for `query` [b, n, q, d]; None: torch's choice."""
    is_measured = query.is_cuda and query.shape[-1] == 128 and query.element_size() == 2
    is_hopper = is_measured and torch.cuda.get_device_capability(query.device) == (9, 0)
    return dict(HOPPER_OPTIONS) if is_hopper else None


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: FlexPlan, scale: float, kernel: Kernel = run_compiled
) -> Tensor:
    """Softmax attention over the visible keys.

    Args:
        query: [b, n, q, d].
        key: [b, g, k, d], every one of the g groups serving n / g heads.
        value: [b, g, k, d].
        plan: see `build_plan`.
        scale: factor on the logits.
        kernel: computes the sorted tokens.

    Returns:
        [b, n, q, d]; exactly 0, with zero gradients, where a query sees no key.
    """
    num_queries = query.shape[2]
    query_length, key_length = plan.block_mask.seq_lengths
    query = _pad(_reorder(query, plan.query_order), query_length)
    key, value = (_pad(_reorder(tensor, plan.key_order), key_length) for tensor in (key, value))
    out = kernel(query, key, value, plan.block_mask, scale)[:, :, :num_queries]
    if plan.query_order is not None:
        index = plan.query_order[:, None, :, None].expand_as(out)
        out = torch.zeros_like(out).scatter(2, index, out)
    return out.masked_fill(~plan.sees_key, 0.0)


def _reorder(tensor: Tensor, order: Tensor | None) -> Tensor:
    """[b, n, s, d] with the tokens of each row in `order` [b, s]."""
    if order is None:
        return tensor
    return tensor.gather(2, order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _pad(tensor: Tensor, length: int) -> Tensor:
    """[b, n, s, d] with zeros up to `length` tokens."""
    return tensor if tensor.shape[2] == length else F.pad(tensor, (0, 0, 0, length - tensor.shape[2]))


def check_gradients(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, kernel: Kernel = run_compiled
) -> None:
    """Run the kernel once, forward and backward, against the dense reference; to be called at start-up.

    Args:
        device: a CUDA device.
        dtype: of the model's activations.
        head_dim: of the model.
        kernel: that is checked.

    Raises:
        ValueError: if an output or gradient is off by more than rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    roles = _test_roles().to(device)
    length = roles.shape[1]
    query, grad = (torch.randn(1, 4, length, head_dim, generator=generator) for _ in range(2))
    key, value = (torch.randn(1, 2, length, head_dim, generator=generator) for _ in range(2))
    query, key, value = inputs = [tensor.to(device, dtype).requires_grad_() for tensor in (query, key, value)]
    exact_query, exact_key, exact_value = exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grad = grad.to(device, dtype)
    scale = head_dim**-0.5
    out = attend(query, key, value, build_plan(roles, roles), scale, kernel)
    expected = dense.attend(exact_query, exact_key, exact_value, dense.build_plan(roles, roles), scale)
    pairs = zip(
        ("output", "dq", "dk", "dv"),
        (out, *torch.autograd.grad(out, inputs, grad)),
        (expected, *torch.autograd.grad(expected, exact, grad.double())),
        strict=True,
    )
    # Rounding of results and probabilities, some units in the last place, and in fp32 of sums and exponentials;
    # products in TF32, which would change what a run computes, are off by a hundred times as much.
    tolerance = max(8 * torch.finfo(dtype).eps, FP32_TOLERANCE)
    for name, got, want in pairs:
        error = float((got.double() - want).detach().norm() / want.detach().norm())
        if not error < tolerance:
            raise ValueError(
                f"attention_backend (flex): {name} is off by {error:.1e} on {device}, at most "
                f"{tolerance:.1e} is expected of {dtype}; use attention_backend chunked."
            )


def _test_roles() -> Tensor:
    """[1, 1024, 3]: documents of several lengths with two views and pruned clean copies, then padding."""
    rows, used = [], 0
    for doc, (size, block) in enumerate([(130, 32), (17, 4), (64, 64), (150, 32), (3, 1)]):
        blocks = torch.arange(size) // block
        for view in (1, 2, 0):
            kept = blocks if view else blocks[blocks < blocks[-1]]
            rows.append(torch.stack([torch.full_like(kept, doc), kept, torch.full_like(kept, view)], dim=1))
            used += len(kept)
    rows.append(torch.tensor([[-1, 0, 0]]).expand(1024 - used, 3))
    return torch.cat(rows).int().unsqueeze(0)

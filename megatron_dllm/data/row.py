"""From a row's plan to its tokens in numpy: layout, noise, roles, targets.

A segment of n tokens is laid out as its noisy views, one after the other, followed by the
clean tokens that some later block reads:

    [view 1: n tokens] [view 2: n tokens] ... [clean: n tokens, less the last block]

so that a query's visible keys are at most two intervals of the row. Where clean tokens predict their next one, the
clean copy lacks the last token alone (see `data.clean_targets`). An AR segment is its clean tokens.
Where not every token may carry a loss, noisy blocks without such a token are left out, and the clean
copy ends before the last block that has one: no target reads what is missing. Of K views, further noisy copies of a
block have the views K + 1 to 2 K, 2 K + 1 to 3 K, ... (see `data.noisy_blocks`), and stand before the clean copy too.

With a shift, the slot before a token predicts it: in its block the slot before it in the same view; of the first token
of a block the last clean slot of the block before, which sees all that may be known, and once for all views. Nothing
predicts the first token of a segment. Blocks of 2, tokens a b | c d, [x] a masked slot:

    slots       a [b] c [d]   a b        b is predicted at noisy a, d at noisy c, c at clean b
Padding stands at the end of the row: document -1, the pad token, position 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.clean_targets import CleanTargets, find_clean_targets
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import LENGTH, RowPlan
from megatron_dllm.data.row_noise import RowNoise, draw_row_noise, row_key
from megatron_dllm.data.row_tokens import CopyTokens, NoisyTokens, RowContent, RowTokens, collect_tokens
from megatron_dllm.data.spans import MASKABLE
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.diffusion.roles import PADDING_DOC

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

# Behind every noisy view, where the clean copy stands.
_LAST_VIEW = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Row:
    """One row in numpy, under the names of `Batch`: tokens are [s], `target_positions` count inside the row.

    What `Batch` has once a row ([b]) is [1] here, and its totals are numbers.
    """

    sample_ids: IntArray
    num_segments: IntArray
    segment_epochs: IntArray
    segment_maskable: IntArray
    row_keys: IntArray
    input_ids: IntArray
    position_ids: IntArray
    roles: NDArray[np.int32]
    is_masked: BoolArray
    target_positions: IntArray
    target_ids: IntArray
    target_t: FloatArray
    loss_weights: FloatArray
    is_fill: BoolArray
    is_ar_target: BoolArray
    num_maskable: int
    num_answers: int
    num_ar_maskable: int
    num_document_tokens: int
    num_forward_tokens: int


def build_row(
    plan: RowPlan,
    content: RowContent,
    geometry: RowGeometry,
    noise: NoiseSpec | None,
    *,
    seed: int,
    mask_token_id: int,
    pad_token_id: int,
    eos_token_id: int | None = None,
) -> Row:
    """Draw a row's noise and lay it out.

    Args:
        plan: segments of the row; none at all makes a row of padding.
        content: their tokens.
        geometry: of the row.
        noise: how tokens are masked; None for AR.
        seed: of the noise.
        mask_token_id: replaces masked tokens.
        pad_token_id: fills the rest of the row.
        eos_token_id: fills the last blocks of turns; needed where the geometry asks for it.
    """
    num_noise_views = 0 if noise is None else noise.num_views
    assert num_noise_views == geometry.num_views, f"noise of {num_noise_views} views, rows of {geometry.num_views}"
    tokens = collect_tokens(content, plan.segments[:, LENGTH], geometry, eos_token_id)
    drawn = None if noise is None else draw_row_noise(plan, content, tokens, noise, seed)
    clean = find_clean_targets(plan, content, tokens.clean, geometry, seed) if geometry.ar_share else None
    return lay_out_row(
        plan, content, tokens, geometry, drawn, clean, mask_token_id=mask_token_id, pad_token_id=pad_token_id
    )


def lay_out_row(
    plan: RowPlan,
    content: RowContent,
    tokens: RowTokens,
    geometry: RowGeometry,
    noise: RowNoise | None,
    clean: CleanTargets | None = None,
    *,
    mask_token_id: int,
    pad_token_id: int,
) -> Row:
    """Place the copies of a row's tokens, mask them and name the targets.

    Args:
        plan: segments of the row.
        content: of the row.
        tokens: of its copies.
        geometry: of the row.
        noise: which tokens of which view are masked; None for AR.
        clean: which clean tokens predict their next one; None: none.
        mask_token_id: replaces masked tokens.
        pad_token_id: fills the rest of the row.

    Returns:
        The row. A position of a noisy view predicts its own token; in AR, and with a shift, the token after it.
    """
    slots = _slots(tokens, geometry)
    num_forward, length = len(slots.token), geometry.row_length
    assert num_forward <= length, f"segments of {num_forward} tokens in a row of {length}"
    is_masked = np.zeros(num_forward, np.bool_)
    if noise is None:
        kinds = None if content.spans is None else content.spans.kinds(plan.segments[:, LENGTH])
        targets = _next_tokens(tokens.clean, kinds)
        if plan.is_ar:  # beside noisy rows, what the AR loss is a mean over
            targets = replace(
                targets,
                is_ar=np.ones(len(targets.ids), np.bool_),
                num_maskable=0,
                num_answers=0,
                num_ar_maskable=targets.num_maskable,
            )
    else:
        targets = _masked_tokens(tokens.noisy, noise, slots, geometry.num_views)
        is_masked[slots.is_noisy] = tokens.noisy.is_hidden[slots.token[slots.is_noisy]]
        is_masked[targets.positions] = True
        if geometry.is_shifted:
            targets = _predicted_before(targets, tokens, noise, slots, geometry.num_views)
        if clean is not None:
            targets = _with_clean_targets(targets, clean, slots)
    return Row(
        sample_ids=content.sample_ids,
        num_segments=np.array([len(content.sample_ids)], dtype=np.int64),
        segment_epochs=np.full(len(content.sample_ids), plan.epoch, dtype=np.int64),
        segment_maskable=np.bincount(targets.maskable_segments, minlength=len(content.sample_ids)),
        row_keys=np.array([row_key(plan, content)], dtype=np.int64),
        input_ids=_padded(np.where(is_masked, mask_token_id, slots.take(tokens, "ids")), length, pad_token_id),
        position_ids=_padded(slots.take(tokens, "position_ids"), length, 0),
        roles=np.stack(
            [
                _padded(slots.take(tokens, "segments"), length, PADDING_DOC),
                _padded(slots.take(tokens, "block_ids"), length, 0),
                _padded(slots.role_view, length, 0),
            ],
            axis=-1,
        ).astype(np.int32),
        is_masked=np.append(is_masked, np.zeros(length - num_forward, np.bool_)),
        target_positions=targets.positions,
        target_ids=targets.ids,
        target_t=targets.t,
        loss_weights=targets.weights,
        is_fill=targets.is_fill,
        is_ar_target=np.zeros(len(targets.ids), np.bool_) if targets.is_ar is None else targets.is_ar,
        num_maskable=targets.num_maskable,
        num_answers=targets.num_answers,
        num_ar_maskable=targets.num_ar_maskable,
        num_document_tokens=tokens.num_document_tokens,
        num_forward_tokens=num_forward,
    )


@dataclass(frozen=True)
class _Targets:
    """Per target ([T]): its slot, token, weight, noise level and whether it is fill; and what could have been one.

    Of what could have been one, `maskable_segments` [m] has the segment of each token, once for all views.
    """

    positions: IntArray
    ids: IntArray
    weights: FloatArray
    t: FloatArray
    is_fill: BoolArray
    maskable_segments: IntArray
    num_maskable: int
    num_answers: int
    is_ar: BoolArray | None = None  # of the AR loss beside the diffusion loss; None: no target is
    num_ar_maskable: int = 0


@dataclass(frozen=True)
class _Slots:
    """Per slot of the row, padding apart ([f]): which of the noisy or clean tokens stands there, and in which view.

    Attributes:
        token: [f] index into the noisy tokens, or the clean ones where `view` is 0.
        view: [f] whose noise the token shows; 0 in clean copies.
        role_view: [f] the view of its role: another one for each copy of a block.
        is_noisy: [f] whether it is a noisy token.
    """

    token: IntArray
    view: IntArray
    role_view: IntArray
    is_noisy: BoolArray

    def take(self, tokens: RowTokens, name: str) -> IntArray:
        """[f] int64 a field of the tokens that stand in the slots."""
        values = np.zeros(len(self.token), np.int64)
        for is_mine, copy in ((self.is_noisy, tokens.noisy), (~self.is_noisy, tokens.clean)):
            values[is_mine] = getattr(copy, name)[self.token[is_mine]]
        return values


def _padded(values: IntArray, length: int, fill: int) -> IntArray:
    padded = np.full(length, fill, dtype=np.int64)
    padded[: len(values)] = values
    return padded


def _slots(tokens: RowTokens, geometry: RowGeometry) -> _Slots:
    """Where the tokens stand: document by document, view by view, the clean copy last."""
    noisy, clean, num_views = tokens.noisy, tokens.clean, geometry.num_views
    num_noisy, num_clean = len(noisy.ids), len(clean.ids)
    token = np.concatenate([np.tile(np.arange(num_noisy), num_views), np.arange(num_clean)])
    view = np.repeat([*range(1, num_views + 1), 0], [*[num_noisy] * num_views, num_clean])
    copies = np.concatenate([np.tile(noisy.copies, num_views), np.zeros(num_clean, np.int64)])
    # Every copy of a block has a view of its own, so that none of them sees another.
    role_view = view + num_views * copies
    segments = np.concatenate([np.tile(noisy.segments, num_views), clean.segments])
    # Stable: what shares segment and view stays in its order, which is that of the blocks.
    order = np.lexsort((np.where(view > 0, role_view, _LAST_VIEW), segments))
    return _Slots(token[order], view[order], role_view[order], view[order] > 0)


def _next_tokens(clean: CopyTokens, kinds: NDArray[np.uint8] | None) -> _Targets:
    """AR: every token predicts its successor in the segment, where that one may carry a loss.

    Args:
        clean: tokens of the row.
        kinds: [n] what each token is, see `data.spans`; None: all are maskable.
    """
    is_next = np.append(clean.segments[1:] == clean.segments[:-1], False)[: len(clean.ids)]
    if kinds is not None:
        is_next &= np.append(kinds[1:] == MASKABLE, False)[: len(is_next)]
    positions = np.flatnonzero(is_next)
    count = len(positions)
    return _Targets(
        positions,
        clean.ids[positions + 1],
        np.ones(count, np.float32),
        np.zeros(count, np.float32),
        np.zeros(count, np.bool_),
        clean.segments[positions],
        count,
        _num_different(clean.segments[positions]),
    )


def _masked_tokens(noisy: NoisyTokens, noise: RowNoise, slots: _Slots, num_views: int) -> _Targets:
    """Block diffusion: every masked token predicts itself."""
    positions = np.flatnonzero(slots.is_noisy)
    positions = positions[noise.is_masked[slots.view[positions], slots.token[positions]]]
    of_target = slots.view[positions], slots.token[positions]
    return _Targets(
        positions,
        noisy.ids[of_target[1]],
        noise.loss_weights[of_target],
        noise.t[of_target],
        noisy.is_fill[of_target[1]],
        noisy.segments[noisy.is_maskable],
        num_views * int(noisy.is_maskable.sum()),
        num_views * _num_different(noisy.turns[noisy.is_maskable]),
    )


def _predicted_before(masked: _Targets, tokens: RowTokens, noise: RowNoise, slots: _Slots, num_views: int) -> _Targets:
    """The masked tokens, each predicted by the slot before it, and the first tokens of blocks by the clean copy."""
    leading, count = tokens.leading, len(tokens.leading.ids)
    positions = np.append(masked.positions - 1, np.flatnonzero(~slots.is_noisy)[leading.places])
    order = np.argsort(positions, kind="stable")
    turns = np.append(tokens.noisy.turns[tokens.noisy.is_maskable], leading.turns)
    return _Targets(
        positions[order],
        np.append(masked.ids, leading.ids)[order],
        np.append(masked.weights, noise.leading_weights)[order],
        np.append(masked.t, np.zeros(count, np.float32))[order],
        np.append(masked.is_fill, np.zeros(count, np.bool_))[order],
        np.append(masked.maskable_segments, leading.segments),
        masked.num_maskable + num_views * count,
        num_views * _num_different(turns),
    )


def _with_clean_targets(targets: _Targets, clean: CleanTargets, slots: _Slots) -> _Targets:
    """Targets and those of the clean tokens, by position; the clean tokens stand in their slots in order."""
    count, places = len(clean.tokens), np.flatnonzero(~slots.is_noisy)
    positions = np.concatenate([targets.positions, places[clean.tokens]])
    order = np.argsort(positions, kind="stable")

    def both(values: NDArray[Any], more: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([values, more])[order]

    return replace(
        targets,
        positions=positions[order],
        ids=both(targets.ids, clean.ids),
        weights=both(targets.weights, np.full(count, clean.weight, np.float32)),
        t=both(targets.t, np.zeros(count, np.float32)),
        is_fill=both(targets.is_fill, np.zeros(count, np.bool_)),
        is_ar=both(np.zeros(len(targets.ids), np.bool_), np.ones(count, np.bool_)),
        num_ar_maskable=clean.num_maskable,
    )


def _num_different(numbers: IntArray) -> int:
    """How many different numbers there are among small ones [n], none below 0 (np.unique takes 0.5 ms a row longer)."""
    return int(np.count_nonzero(np.bincount(numbers)))

"""The pictures of a report, drawn from a track's records and one of its packed rows. PNG bytes each.

A line ends where there is nothing to draw: a value that was not logged, a stage that ended, records that are missing;
and where a validation measures something else than the one before.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, VIEW, visible
from megatron_dllm.evaluation.answer_scores import AnswerScores
from megatron_dllm.reporting.held_out import alike
from megatron_dllm.reporting.records import Record, broken_line, is_logged, number, numbers

ROLES = ("masked", "visible", "clean")
_TEAL, _RED, _GREY = "#00798c", "#d1495b", "#777777"
COLORS = (_TEAL, _RED, "#edae49", "#30638e", "#6a994e", "#8d5a97", "#b08968", "#003d5b")
_MARKERS = "so^vDP*X"
_MASK_COLORS = ("#ffffff", "#e9e9e9", _RED, "#edae49", _TEAL)
_MASK_LABELS = (
    "padding",
    "hidden",
    "noisy block sees itself",
    "noisy sees earlier clean blocks",
    "clean sees clean up to its block",
)
_SMOOTH = 9  # records of a running mean
_MILLION = 1e6


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    for axis in figure.axes:
        is_right = axis.yaxis.get_ticks_position() == "right"
        axis.spines["top"].set_visible(False)
        axis.spines["left" if is_right else "right"].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _line(
    axis: Axes,
    records: Sequence[Record],
    key: str,
    color: object,
    label: str = "",
    width: int = 1,
    is_apart_by_stage: bool = True,
) -> None:
    """A series over consumed tokens, broken where there is nothing; a point between two breaks gets a dot."""
    tokens, values = broken_line(records, "consumed_tokens", key, width, is_apart_by_stage)
    tokens = tokens / _MILLION
    axis.plot(tokens, values, color=color, lw=1.3, label=label or None)
    is_there = np.pad(np.isfinite(values), 1)
    is_alone = is_there[1:-1] & ~is_there[2:] & ~is_there[:-2]
    axis.plot(tokens[is_alone], values[is_alone], ".", color=color, ms=4)


def _stages(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(str(record.get("stage", "")) for record in records))


def _mark_stages(axis: Axes, records: Sequence[Record]) -> None:
    """A faint line where a stage ends."""
    for before, after in pairwise(records):
        if before.get("stage") != after.get("stage"):
            axis.axvline(number(before.get("consumed_tokens")) / _MILLION, color="#dddddd", lw=0.8, zorder=0)


def _label_tokens(axis: Axes) -> None:
    axis.set_xlabel("document tokens (millions)")
    axis.margins(x=0.01)
    axis.set_xlim(left=-0.01 * axis.get_xlim()[1])  # from the beginning, with room for a marker there


def schedule_picture(records: Sequence[Record]) -> bytes:
    """Learning rate over consumed tokens, and the block size where it changes."""
    figure = _figure(8, 2.8)
    axis = figure.subplots()
    _line(axis, records, "learning_rate", _RED, is_apart_by_stage=False)
    axis.set_ylabel("learning rate", color=_RED)
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _label_tokens(axis)
    sizes = numbers(records, "block_size")
    ticks = np.unique(sizes[np.isfinite(sizes)])
    if len(ticks) > 1:
        blocks = axis.twinx()
        blocks.step(numbers(records, "consumed_tokens") / _MILLION, sizes, where="pre", color=_TEAL, lw=2)
        blocks.set_yscale("log", base=2)
        blocks.minorticks_off()
        blocks.set_yticks(ticks, [f"{tick:.0f}" for tick in ticks])
        blocks.set_ylabel("block size", color=_TEAL)
        blocks.margins(x=0.01)
    return _png(figure)


def loss_picture(records: Sequence[Record]) -> bytes:
    """Training loss over consumed tokens with a running mean; each stage has a colour."""
    figure = _figure(8, 3.2)
    axis = figure.subplots()
    axis.plot(numbers(records, "consumed_tokens") / _MILLION, numbers(records, "loss"), ".", color="#cccccc", ms=2.5)
    for index, stage in enumerate(_stages(records)):
        chosen = [record for record in records if str(record.get("stage", "")) == stage]
        _line(axis, chosen, "loss", COLORS[index % len(COLORS)], stage, _SMOOTH)
    axis.set_ylabel("loss (nats per token)")
    _label_tokens(axis)
    if len(_stages(records)) > 1:
        axis.legend(fontsize=7, ncol=4, frameon=False)
    return _png(figure)


def elbo_picture(records: Sequence[Record], ar_nll: float | None, checkpoints: dict[str, dict[str, float]]) -> bytes:
    """Validation over consumed tokens at every measured block size, with the AR model and later checkpoints beside it.

    Args:
        records: validations.
        ar_nll: of the AR model; None where there is none.
        checkpoints: by name, the ELBO at each block size of checkpoints that were made of the run's.
    """
    figure = _figure(8, 3.6)
    axis = figure.subplots()
    names = sorted(
        {key.split("/")[1] for record in records for key in record if key.startswith("validation_elbo/")},
        key=lambda name: int(name) if name.isdigit() else 0,
    )
    most = max(np.isfinite(numbers(records, f"validation_elbo/{name}")).sum() for name in names)
    right = max(number(record.get("consumed_tokens")) for record in records) / _MILLION * 1.02
    for index, name in enumerate(names):
        color, marker = COLORS[index % len(COLORS)], _MARKERS[index % len(_MARKERS)]
        # A size that is measured at the ends of stages alone has nothing between them: points without a line.
        line = "-" if np.isfinite(numbers(records, f"validation_elbo/{name}")).sum() == most else ""
        label: str | None = f"block {name}" if name.isdigit() else "AR, exact NLL"
        for part in alike(records):
            tokens = numbers(part, "consumed_tokens") / _MILLION
            values = numbers(part, f"validation_elbo/{name}")
            axis.plot(tokens, values, line, marker=marker, ms=4, lw=1.4, color=color, label=label, alpha=0.9)
            label = None
        for elbo in checkpoints.values():
            if name in elbo:
                axis.plot(right, elbo[name], "*", ms=11, color=color, mec="white", mew=0.6)
    if ar_nll is not None:
        axis.axhline(ar_nll, color="black", ls="--", lw=1, label="AR base, exact NLL")
    _mark_stages(axis, records)
    axis.set_ylabel("validation (nats per token)")
    _label_tokens(axis)
    axis.legend(fontsize=7, ncol=3, frameon=False)
    return _png(figure)


def noise_level_picture(records: Sequence[Record]) -> bytes | None:
    """NLL of masked tokens by noise level, as running means; None where fewer than two levels were logged."""
    keys = sorted({key for record in records for key in record if key.startswith("nll_t/")})
    keys = [key for key in keys if is_logged(records, key)]
    if len(keys) < 2:
        return None
    figure = _figure(8, 3.2)
    axis = figure.subplots()
    levels = [np.mean([float(end) for end in key.removeprefix("nll_t/").split("-")]) for key in keys]
    shades, scale = colormaps["viridis"], Normalize(0.0, 1.0)
    for key, level in zip(keys, levels, strict=True):
        _line(axis, records, key, shades(scale(level)), width=_SMOOTH)
    figure.colorbar(ScalarMappable(scale, shades), ax=axis, label="noise level t", pad=0.01)
    axis.set_ylabel("NLL (nats per masked token)")
    _label_tokens(axis)
    _mark_stages(axis, records)
    return _png(figure)


def speed_picture(records: Sequence[Record]) -> bytes:
    """Throughput and gradient norm over consumed tokens."""
    figure = _figure(9, 2.9)
    left, right = figure.subplots(1, 2)
    for key, color, label in (
        ("tokens_per_second", _TEAL, "document tokens"),
        ("forward_tokens_per_second", "#edae49", "model tokens"),
    ):
        if is_logged(records, key):
            _line(left, records, key, color, label)
    left.set_ylabel("tokens per second")
    left.set_ylim(bottom=0)
    left.legend(fontsize=7, frameon=False)
    _line(right, records, "grad_norm", _RED)
    right.set_ylabel("gradient norm")
    norms = numbers(records, "grad_norm")
    norms = norms[np.isfinite(norms) & (norms > 0)]
    if len(norms) and norms.max() > 30 * norms.min():
        right.set_yscale("log")
    for axis in (left, right):
        _label_tokens(axis)
        _mark_stages(axis, records)
    return _png(figure)


def router_picture(records: Sequence[Record]) -> bytes | None:
    """Busiest expert over the mean, by role, over the run; and the share of each expert at the last logged step."""
    loads = [record for record in records if np.sum(record.get("router_load", 0)) > 0]
    if not loads:
        return None
    figure = _figure(9, 2.9)
    left, right = figure.subplots(1, 2)
    for role, color in zip(ROLES, (_RED, "#edae49", _TEAL), strict=True):
        if is_logged(records, f"router_imbalance/{role}"):
            _line(left, records, f"router_imbalance/{role}", color, role)
    left.set_ylabel("busiest expert / mean")
    _label_tokens(left)
    _mark_stages(left, records)
    left.legend(fontsize=7, frameon=False)
    load = np.array(loads[-1]["router_load"], dtype=np.float64)
    total = load.sum(-1, keepdims=True)
    is_routed = total[:, 0] > 0
    share = load[is_routed] / total[is_routed] * load.shape[-1]
    image = right.imshow(share, aspect="auto", cmap="viridis", vmin=0)
    right.set_yticks(range(len(share)), [role for role, routed in zip(ROLES, is_routed, strict=True) if routed])
    right.set_xlabel(f"expert, at step {number(loads[-1].get('step')):.0f}")
    figure.colorbar(image, ax=right, label="load, 1 = even", pad=0.01)
    return _png(figure)


def answers_picture(scores: Mapping[str, AnswerScores]) -> bytes:
    """Share of right answers and tokens per forward over the threshold, a line for each model.

    Args:
        scores: by name of the model.
    """
    figure = _figure(9, 3.0)
    left, right = figure.subplots(1, 2)
    for index, (name, score) in enumerate(scores.items()):
        thresholds = [entry.threshold for entry in score.thresholds]
        totals = [entry.all_tasks for entry in score.thresholds]
        style = {"marker": _MARKERS[index % len(_MARKERS)], "color": COLORS[index % len(COLORS)], "label": name}
        left.plot(thresholds, [total.accuracy for total in totals], **style, ms=4, lw=1.4)
        right.plot(thresholds, [total.tokens_per_forward for total in totals], **style, ms=4, lw=1.4)
    left.set_ylabel("share of right answers")
    left.set_ylim(0, 1.02)
    right.set_ylabel("tokens per forward")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xlabel("threshold")
        axis.legend(fontsize=7, frameon=False)
    return _png(figure)


def mask_classes(batch: Batch) -> NDArray[np.int64]:
    """[s, s] class of each pair of the first row: 0 padding, 1 hidden, 2 own noisy block, 3 noisy to clean, 4 clean."""
    roles = batch.roles[0]
    allowed = visible(roles, roles).numpy()
    is_clean = (roles[:, VIEW] == CLEAN_VIEW).numpy()
    is_token = (roles[:, DOC] >= 0).numpy()
    classes = np.where(is_token[:, None] & is_token[None, :], 1, 0)
    classes[allowed & ~is_clean[:, None] & ~is_clean[None, :]] = 2
    classes[allowed & ~is_clean[:, None] & is_clean[None, :]] = 3
    classes[allowed & is_clean[:, None] & is_clean[None, :]] = 4
    return classes


def mask_picture(batch: Batch) -> bytes:
    """The attention mask of one packed row: queries down, keys across."""
    figure = _figure(6.2, 5.6)
    axis = figure.subplots()
    colors = ListedColormap(_MASK_COLORS)
    axis.imshow(mask_classes(batch), cmap=colors, norm=BoundaryNorm(np.arange(6) - 0.5, 5), interpolation="nearest")
    patches = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="#888888") for color in _MASK_COLORS]
    figure.legend(patches, _MASK_LABELS, fontsize=7, loc="outside lower center", ncol=3, frameon=False)
    axis.set_xlabel("key")
    axis.set_ylabel("query")
    return _png(figure)

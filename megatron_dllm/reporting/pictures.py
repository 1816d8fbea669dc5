"""The pictures of a report, drawn from a run's metrics and one of its packed rows. PNG bytes each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, VIEW, visible

Records = Sequence[dict[str, Any]]
_STAGE_COLORS = plt.get_cmap("tab10").colors
_MASK_COLORS = ("#ffffff", "#e9e9e9", "#d1495b", "#edae49", "#00798c")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def _stages(records: Records) -> list[str]:
    return list(dict.fromkeys(record["stage"] for record in records))


def schedule_picture(records: Records) -> bytes:
    """Block size and learning rate over optimizer steps."""
    steps = [r["step"] for r in records]
    figure, axis = plt.subplots(figsize=(8, 3.2))
    axis.step(steps, [r["block_size"] for r in records], where="post", color="#00798c", lw=2)
    axis.set_yscale("log", base=2)
    axis.set_xlabel("step")
    axis.set_ylabel("block size", color="#00798c")
    rate = axis.twinx()
    rate.plot(steps, [r["learning_rate"] for r in records], color="#d1495b", lw=1.2)
    rate.set_ylabel("learning rate", color="#d1495b")
    rate.set_ylim(bottom=0)
    axis.set_title("Warmup-Stable-Decay of the block size")
    return _png(figure)


def loss_picture(records: Records) -> bytes:
    """Training loss over consumed tokens with a running mean; each stage has a colour."""
    figure, axis = plt.subplots(figsize=(8, 3.2))
    for index, stage in enumerate(_stages(records)):
        chosen = [r for r in records if r["stage"] == stage]
        tokens = np.array([r["consumed_tokens"] for r in chosen]) / 1e6
        loss = np.array([r["loss"] for r in chosen])
        color = _STAGE_COLORS[index % len(_STAGE_COLORS)]
        axis.plot(tokens, loss, color=color, alpha=0.3, lw=0.8)
        width = min(9, len(loss))
        if width > 1:
            smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
            axis.plot(tokens[width - 1 :], smooth, color=color, lw=1.8, label=stage)
    axis.set_xlabel("document tokens (millions)")
    axis.set_ylabel("loss (nats per token)")
    axis.set_title("Training loss by stage: a bound on the NLL at the stage's block size")
    axis.legend(fontsize=7, ncol=4)
    return _png(figure)


def elbo_picture(records: Records, ar_nll: float | None, merged: dict[str, float]) -> bytes:
    """Validation ELBO over consumed tokens at every measured block size, with the AR model and the merge."""
    sizes = sorted(
        {
            int(k.split("/")[1])
            for r in records
            for k in r
            if k.startswith("validation_elbo/") and k.split("/")[1].isdigit()
        }
    )
    figure, axis = plt.subplots(figsize=(8, 3.4))
    for index, size in enumerate(sizes):
        points = [
            (r["consumed_tokens"] / 1e6, r[f"validation_elbo/{size}"])
            for r in records
            if f"validation_elbo/{size}" in r
        ]
        color = _STAGE_COLORS[index % len(_STAGE_COLORS)]
        axis.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.5, color=color, label=f"block {size}")
        if str(size) in merged:
            axis.plot(points[-1][0] * 1.02, merged[str(size)], marker="*", ms=11, color=color)
    if ar_nll is not None:
        axis.axhline(ar_nll, color="black", ls="--", lw=1, label="AR base, exact NLL")
    axis.set_xlabel("document tokens (millions)")
    axis.set_ylabel("nats per token")
    axis.set_title("Validation ELBO (star: merged checkpoint)")
    axis.legend(fontsize=7, ncol=3)
    return _png(figure)


def mask_classes(batch: Batch) -> np.ndarray:
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


def mask_picture(batch: Batch, title: str) -> bytes:
    """The attention mask of one packed row: queries down, keys across."""
    figure, axis = plt.subplots(figsize=(6.2, 6.2))
    colors = ListedColormap(_MASK_COLORS)
    axis.imshow(mask_classes(batch), cmap=colors, norm=BoundaryNorm(np.arange(6) - 0.5, 5), interpolation="nearest")
    labels = (
        "padding",
        "hidden",
        "noisy block sees itself",
        "noisy sees earlier clean blocks",
        "clean sees clean up to its block",
    )
    patches = [plt.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="#888888") for color in _MASK_COLORS]
    axis.legend(patches, labels, fontsize=7, loc="lower left")
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("key")
    axis.set_ylabel("query")
    return _png(figure)


def router_picture(records: Records, roles: Sequence[str]) -> bytes | None:
    """Share of tokens that each expert gets, by role, at the last logged step; and the imbalance over the run."""
    loads = [r for r in records if "router_load" in r]
    if not loads:
        return None
    load = np.array(loads[-1]["router_load"])
    share = load / np.maximum(load.sum(-1, keepdims=True), 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), width_ratios=(3, 2))
    image = left.imshow(share * load.shape[-1], aspect="auto", cmap="viridis", vmin=0)
    left.set_yticks(range(len(roles)), roles)
    left.set_xlabel("expert")
    left.set_title("Load by role, 1 = even (sum over layers)", fontsize=9)
    figure.colorbar(image, ax=left)
    for role in roles:
        key = f"router_imbalance/{role}"
        points = [(r["step"], r[key]) for r in loads if key in r]
        if points:
            right.plot(*zip(*points, strict=True), label=role, lw=1.2)
    right.set_xlabel("step")
    right.set_title("busiest expert / mean", fontsize=9)
    right.legend(fontsize=7)
    return _png(figure)

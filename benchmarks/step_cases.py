"""What the step benchmark runs: models, noised documents, and the ways to lay out and compute one step.

Every way computes the same loss of the same masked tokens. The baseline is what public trainers do: a dense mask,
the logits of every token, a whole clean copy of every document, one clean copy per noisy view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from megatron_dllm.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.roles import CLEAN_VIEW, DOC, PADDING_DOC, visible_keys

_TOKENS = dict(mask_token_id=2, eos_token_id=0, pad_token_id=1)
_SMALL = dict(num_layers=4, hidden_size=256, kv_channels=64, num_query_groups=2, max_position_embeddings=65536)
MODELS: dict[str, dict[str, Any]] = {
    # Attention dominates at a few thousand tokens: 8 heads of 64 in a model 256 wide.
    "attention": dict(**_SMALL, num_attention_heads=8, ffn_hidden_size=512, vocab_size=4096),
    # The experts dominate: 8 of 64 a token, and half the heads.
    "moe": dict(
        **_SMALL,
        num_attention_heads=4,
        ffn_hidden_size=1024,
        vocab_size=8192,
        num_dense_layers=1,
        num_moe_experts=64,
        moe_ffn_hidden_size=256,
        moe_shared_expert_intermediate_size=256,
        moe_router_topk=8,
        moe_router_num_groups=8,
        moe_router_group_topk=4,
        moe_router_topk_scaling_factor=2.5,
    ),
}
SLICES = {"llada2_mini": "ling_mini"}


def model_config(name: str, **changes: Any) -> ModelConfig:
    """A small model of `MODELS`, or the first layers of a real one (`SLICES`)."""
    if name in MODELS:
        fields = {**MODELS[name], **_TOKENS}
    else:
        path = Path(__file__).resolve().parents[1] / "recipes" / "model" / f"{SLICES[name]}.yaml"
        fields = yaml.safe_load(path.read_text(encoding="utf-8")) | {"num_layers": 4}
    return ModelConfig(**(fields | changes))


@dataclass(frozen=True)
class Variant:
    """Which savings a step makes.

    Attributes:
        attention: compute only visible pairs, in place of a dense mask.
        head: logits of masked tokens only, in chunks; else of every token, at once.
        prune: leave out clean blocks that no later block reads.
        share: noisy views share one clean copy; else each view is a row with its own.
        last: the last layer's outputs for masked tokens only (needs `head`).
        experts: all experts at once; else megatron-core's SequentialMLP.
        recompute: keep only each layer's input, and compute the layer again in the backward pass.
    """

    attention: bool = False
    head: bool = False
    prune: bool = False
    share: bool = False
    last: bool = False
    experts: bool = True
    recompute: bool = False


SAVINGS = ("attention", "head", "prune", "share", "last", "experts")
BASELINE, OURS = Variant(), Variant(True, True, True, True, True)
OURS_RECOMPUTED = replace(OURS, recompute=True)


def ablations(views: int, is_moe: bool) -> dict[str, Variant]:
    """Baseline and ours, each saving alone on top of the baseline, and ours without each."""
    names = [name for name in SAVINGS if (name != "share" or views > 1) and (name != "experts" or is_moe)]
    variants = {"baseline": BASELINE, "ours": OURS}
    for name in names:
        if name == "last":
            variants["baseline + head + last"] = replace(BASELINE, head=True, last=True)
        elif name != "experts":
            variants[f"baseline + {name}"] = replace(BASELINE, **{name: True})
    for name in names:
        without = {name: False} | ({"last": False} if name == "head" else {})
        variants["ours - head - last" if name == "head" else f"ours - {name}"] = replace(OURS, **without)
    return variants | {"baseline + recompute": replace(BASELINE, recompute=True), "ours + recompute": OURS_RECOMPUTED}


@dataclass(frozen=True)
class Documents:
    """Noised documents: n tokens, k views.

    Attributes:
        lengths: tokens of each document.
        ids: [n] int64.
        is_masked: [k, n] bool.
        weights: [k, n] fp32, 1/t.
        block: tokens denoised together.
    """

    lengths: tuple[int, ...]
    ids: Tensor
    is_masked: Tensor
    weights: Tensor
    block: int


def draw_documents(lengths: Sequence[int], block: int, views: int, vocab_size: int, seed: int = 0) -> Documents:
    """Random tokens, one noise level per block; a second view masks what the first does not."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.cat(
        [
            (0.02 + 0.96 * torch.rand(-(-length // block), generator=generator)).repeat_interleave(block)[:length]
            for length in lengths
        ]
    )
    ids = torch.randint(4, vocab_size, levels.shape, generator=generator)
    is_masked = torch.rand(levels.shape, generator=generator) < levels
    return Documents(
        tuple(lengths),
        ids,
        torch.stack([is_masked, ~is_masked])[:views],
        torch.stack([1 / levels, 1 / (1 - levels)])[:views],
        block,
    )


def build_batch(documents: Documents, variant: Variant, mask_token_id: int, multiple: int = 1) -> Batch:
    """The documents as one micro-batch: [views; clean] in one row, or a row [view; clean] for every view.

    Padding fills a row up to a `multiple` of tokens.
    """
    views = range(1, len(documents.is_masked) + 1)
    groups = [list(views)] if variant.share else [[view] for view in views]
    rows = [_build_row(documents, group, variant.prune) for group in groups]
    padding = torch.tensor([[0, PADDING_DOC, 0, CLEAN_VIEW]])
    # Columns of a row: source token, doc, block, view.
    table = torch.stack([torch.cat([row, padding.expand(-len(row) % multiple, 4)]) for row in rows])
    source, view = table[..., 0], table[..., 3]
    noisy = view > CLEAN_VIEW
    is_masked = documents.is_masked[(view - 1).clamp(min=0), source] & noisy
    ids = documents.ids[source]
    targets = is_masked.flatten().nonzero().flatten()
    weights = documents.weights[(view - 1).clamp(min=0), source].flatten()[targets]
    starts = torch.tensor(documents.lengths).cumsum(0) - torch.tensor(documents.lengths)
    total = sum(documents.lengths)
    return Batch(
        input_ids=torch.where(is_masked, mask_token_id, ids),
        position_ids=source - starts[table[..., 1]],
        roles=table[..., 1:].int().contiguous(),
        is_masked=is_masked,
        target_positions=targets,
        target_ids=ids.flatten()[targets],
        loss_weights=weights,
        target_t=1 / weights,
        row_keys=torch.arange(len(rows)),
        sample_ids=starts.repeat(len(rows)),
        num_segments=torch.full((len(rows),), len(starts)),
        segment_epochs=torch.zeros(len(starts) * len(rows), dtype=torch.int64),
        segment_maskable=torch.tensor(documents.lengths).repeat(len(rows)),
        is_fill=torch.zeros(len(targets), dtype=torch.bool),
        is_ar_target=torch.zeros(len(targets), dtype=torch.bool),
        num_maskable=torch.tensor(total * len(views)),
        num_answers=torch.tensor(len(documents.lengths) * len(views)),
        num_ar_maskable=torch.tensor(0),
        num_document_tokens=torch.tensor(total),
        num_forward_tokens=torch.tensor(int((table[..., 1] >= 0).sum())),
    )


def _build_row(documents: Documents, views: list[int], is_pruned: bool) -> Tensor:
    """[s, 4] int64 (source token, doc, block, view) of the slots of a row."""
    parts, start = [], 0
    for doc, length in enumerate(documents.lengths):
        place = torch.arange(length)
        block = place // documents.block
        for view in [*views, CLEAN_VIEW]:
            kept = place if view or not is_pruned else place[block < block[-1]]
            parts.append(
                torch.stack([kept + start, torch.full_like(kept, doc), block[kept], torch.full_like(kept, view)], dim=1)
            )
        start += length
    return torch.cat(parts)


class _NoAttention:
    """A backend that returns the values unchanged, to measure a step without attention."""

    IS_COMPILED_PER_SHAPE = False

    @staticmethod
    def build_plan(query_roles: Tensor, key_roles: Tensor) -> tuple[()]:
        """Nothing to plan, for roles [b, q, 3] and [b, k, 3]."""
        return ()

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, plan: tuple[()], scale: float) -> Tensor:
        """[b, n, q, d] the first values, with gradients of all inputs."""
        value = value[:, :, : query.shape[2]].repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return value + 0.0 * (query + key.sum() * 0.0)


def build(model: ModelConfig, variant: Variant, layout: ParallelConfig, has_attention: bool = True) -> Any:
    """The model that computes a variant, without its attention if told so. Process groups must exist."""
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.model.paths import Choice, choose_paths
    from megatron_dllm.parallel.device import DeviceFacts
    from megatron_dllm.parallel.groups import Groups

    if variant.recompute:
        layout = replace(layout, recompute="full")
    paths = choose_paths(model, layout, DeviceFacts.here(), "auto" if variant.attention else "dense")
    if not variant.experts and model.is_moe:
        paths = replace(paths, experts=Choice("sequential", "the baseline"))
    built = build_model(
        model, layout, Groups.current(), paths=paths, training=TrainingConfig(skip_unused_outputs=variant.last)
    )
    if not has_attention:
        built.attention = replace(built.attention, backend=_NoAttention)
    for module in built.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    return built.train()


def with_experts_apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameter name, those of joined experts [e, ...] also under each expert's name in SequentialMLP."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        prefix, _, number = name.rpartition(".weight")
        if prefix.endswith(".mlp.experts"):
            for expert, part in enumerate(tensor):
                result[f"{prefix}.local_experts.{expert}.linear_fc{number}.weight"] = part
    return result


def loss_of(built: Any, batch: Batch, variant: Variant) -> Tensor:
    """[] weighted loss of the masked tokens."""
    if variant.head:
        return (built(batch).nll * batch.loss_weights).sum()
    every = torch.arange(batch.input_ids.numel(), device=batch.input_ids.device)
    hidden = built._decode(built._embed(batch, 0.0, 0), batch.position_ids, batch.roles, every)
    logits = torch.matmul(hidden, built._head_weight().t()).float()
    labels = torch.full_like(every, -100).index_copy(0, batch.target_positions, batch.target_ids)
    weights = torch.zeros(len(every), device=every.device).index_copy(0, batch.target_positions, batch.loss_weights)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def step(built: Any, batch: Batch, variant: Variant) -> Callable[[], Tensor]:
    """Forward and backward into existing gradients; the optimizer, the same for all variants, is left out."""

    def run() -> Tensor:
        loss = loss_of(built, batch, variant)
        loss.backward()
        return loss.detach()

    return run


def needed_flops(model: ModelConfig, batch: Batch) -> float:
    """Floating-point operations of forward and backward (three times forward) that the loss depends on.

    Of the batch as it is laid out: matrix products of its tokens, visible pairs, the last layer and the head for
    targets only. Norms, rotation, softmax and recomputation are not counted.
    """
    tokens, targets = int((batch.roles[..., DOC] >= 0).sum()), len(batch.target_ids)
    h, inner = model.hidden_size, model.num_attention_heads * model.kv_channels
    qkv = h * (inner + 2 * model.num_query_groups * model.kv_channels)
    dense = 3 * h * model.ffn_hidden_size
    experts = (
        3 * h * (model.moe_router_topk * model.moe_ffn_hidden_size + model.moe_shared_expert_intermediate_size)
        + h * model.num_moe_experts
    )
    macs = 0.0
    for layer in range(model.num_layers):
        is_last = layer == model.num_layers - 1
        after = targets if is_last else tokens
        mlp = experts if model.is_moe and layer >= model.num_dense_layers else dense
        pairs = count_pairs(batch, targets_only=is_last)
        macs += tokens * qkv + after * (inner * h + mlp) + 2 * pairs * inner
    return 6.0 * (macs + targets * h * model.vocab_size)


def count_pairs(batch: Batch, targets_only: bool = False) -> int:
    """Visible (query, key) pairs of the batch, or only those whose query is a target."""
    seen = np.stack([visible_keys(roles) for roles in batch.roles.cpu().numpy()])
    return int(seen.flat[batch.target_positions.cpu().numpy()].sum() if targets_only else seen.sum())

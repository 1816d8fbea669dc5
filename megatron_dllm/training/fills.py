"""How full the rows of a run's stages will be: what its table of steps and its warnings about a corpus rest on."""

from __future__ import annotations

from megatron_dllm.config import TrainConfig
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.packing import RowFill, estimate_fill
from megatron_dllm.diffusion.block_schedule import BlockSchedule, RowEstimate, Stage
from megatron_dllm.training.sources import Sources

# By corpus and geometry: what the rows of one hold under the other.
Fills = dict[tuple[str, RowGeometry], RowFill]


def measure_fills(config: TrainConfig, schedule: BlockSchedule, sources: Sources) -> Fills:
    """How the rows of each stage are filled, measured by packing the first chunks of each of its corpora."""
    fills: Fills = {}
    for stage in schedule.stages:
        wanted = [(part.prefix, rows) for part in config.blend_of(stage.name) for rows, _ in _row_kinds(config, stage)]
        for prefix, geometry in wanted:
            if (prefix, geometry) not in fills:
                source = sources.corpora[prefix]
                fills[prefix, geometry] = estimate_fill(
                    source.document_lengths,
                    geometry,
                    seed=config.run.seed,
                    chunk=config.data.packing_chunk,
                    spans=source.spans,
                    is_paired=source.is_paired,
                )
    return fills


def _row_kinds(config: TrainConfig, stage: Stage) -> list[tuple[RowGeometry, float]]:
    """The geometries of a stage's rows, with their shares of the document tokens: AR rows have one of their own."""
    geometry, share = RowGeometry.of_stage(stage.config, config.schedule, config.data), stage.config.ar_row_share
    return [(geometry, 1.0 - share), *([(geometry.ar_rows(), share)] if share else [])]


def row_estimates(config: TrainConfig, schedule: BlockSchedule, fills: Fills) -> dict[str, RowEstimate]:
    """By stage name, what a row holds."""
    estimates = {}
    for stage in schedule.stages:
        kinds = _row_kinds(config, stage)
        parts = config.blend_of(stage.name)
        shares = [(part.share * share, fills[part.prefix, rows]) for part in parts for rows, share in kinds]
        if len(shares) == 1:
            ((_, fill),) = shares
            estimates[stage.name] = RowEstimate(fill.document_tokens, fill.forward_tokens)
            continue
        # A share counts tokens; the fuller the rows of a corpus, the fewer of them make up its share.
        rows = [share / fill.document_tokens for share, fill in shares]
        forward = sum(count * fill.forward_tokens for count, (_, fill) in zip(rows, shares, strict=True))
        estimates[stage.name] = RowEstimate(1.0 / sum(rows), forward / sum(rows))
    return estimates


def dropped_warnings(fills: Fills) -> list[str]:
    """Which corpora hold segments that no stage trains on, a sentence each; all stages have one context length."""
    shares = {prefix: fill.dropped_share for (prefix, _), fill in fills.items()}
    return [
        f"corpus {prefix}: {share:.1%} of its segments hold no token that may carry a loss and are left out (of its "
        "first documents; dropped_segments in the metrics counts them)."
        for prefix, share in shares.items()
        if share > 0.0
    ]

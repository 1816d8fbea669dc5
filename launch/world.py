"""How many ranks the next attempt at a training job needs: all, unless the schedule's next stage asks for its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.record import read_json
from megatron_dllm.checkpoint.folder import latest_checkpoint
from megatron_dllm.run.names import STATE

if TYPE_CHECKING:
    # The job's supervisor runs without packages.
    from megatron_dllm.config import TrainConfig


def schedule_stages(config: TrainConfig) -> list[dict[str, Any]]:
    """The schedule as the launcher needs it: tokens and ranks of every stage, as plain data."""
    return [
        {"name": name, "num_tokens": stage.num_tokens, "world_size": stage.world_size}
        for name, stage in config.schedule.stages.items()
    ]


def wanted_ranks(stages: Sequence[dict[str, Any]], run_folder: Path) -> int | None:
    """Ranks that the next stage of the schedule asks for; None: as many as there are."""
    # As training itself finds it: `latest` may lag behind, or name one that is damaged.
    folder = latest_checkpoint(run_folder / "checkpoints")
    state = read_json(folder / STATE) if folder else None
    consumed = (state or {}).get("consumed_tokens", 0)
    end = 0
    for stage in stages:
        if stage["world_size"] is None:  # then no stage gives one; tokens may be null, where epochs count
            return None
        end += stage["num_tokens"]
        if consumed < end:
            ranks: int | None = stage["world_size"]
            return ranks
    return None


def spread(ranks: int, ranks_per_node: int) -> tuple[int, int]:
    """Nodes, and ranks on each, for so many ranks.

    Raises:
        ValueError: they do not divide evenly.
    """
    if ranks <= ranks_per_node:
        return 1, ranks
    if ranks % ranks_per_node:
        raise ValueError(
            f"world_size ({ranks}) must be a multiple of cluster.ranks_per_node ({ranks_per_node}), or "
            "smaller; choose another number of ranks for this stage of the schedule."
        )
    return ranks // ranks_per_node, ranks_per_node

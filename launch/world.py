"""How many ranks the next start of a training stage needs: all, unless the schedule's next part asks for its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.record import read_json
from megatron_dllm.checkpoint.folder import STATE, latest_checkpoint

if TYPE_CHECKING:
    # The job's supervisor runs without packages.
    from megatron_dllm.config import TrainConfig


def schedule_parts(config: TrainConfig) -> list[dict[str, Any]]:
    """The schedule as the launcher needs it: tokens and ranks of every part, as plain data."""
    return [
        {"name": name, "num_tokens": part.num_tokens, "world_size": part.world_size}
        for name, part in config.schedule.stages.items()
    ]


def wanted_ranks(parts: Sequence[dict[str, Any]], run_folder: Path) -> int | None:
    """Ranks that the part of the schedule which comes next asks for; None: as many as there are."""
    # As training itself finds it: `latest` may lag behind, or name one that is damaged.
    folder = latest_checkpoint(run_folder / "checkpoints")
    state = read_json(folder / STATE) if folder else None
    consumed = (state or {}).get("consumed_tokens", 0)
    end = 0
    for part in parts:
        end += part["num_tokens"]
        if consumed < end:
            return part["world_size"]
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
            "smaller; choose another number of ranks for this part of the schedule."
        )
    return ranks // ranks_per_node, ranks_per_node

"""The command that scores pairs: the words of a run of preferences, and `scores=FILE`.

torchrun --nproc_per_node N -m megatron_dllm.evaluate experiment=dpo checkpoint.load=DIR scores=PREFIX.scores
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from megatron_dllm.checkpoint.brought import fill
from megatron_dllm.compose import compose_dict, to_train_config
from megatron_dllm.config import TrainConfig
from megatron_dllm.config.evaluate import spelled_out
from megatron_dllm.config.recipe_source import split_folder
from megatron_dllm.config.rules import check
from megatron_dllm.run.files import parents_made
from megatron_dllm.run.place import is_rank_zero, world_size

if TYPE_CHECKING:
    from megatron_dllm.training.scoring import Scoring

# Words that are not those of the run of preferences; the ending of a file of scores beside its corpus.
_OWN_WORDS, _SUFFIX = ("scores", "overwrite"), ".scores"
# Between two times at which a scoring keeps what it has.
_SECONDS_BETWEEN = 300.0


def score(words: Sequence[str]) -> None:
    """Score the pairs of a run of preferences with the weights that it starts from, and write the file (a collective).

    Args:
        words: of that run's command line, with `scores=FILE`, and perhaps `overwrite=true`.

    Raises:
        ValueError: what that run would refuse, or a place that cannot be written or has a file.
    """
    from megatron_dllm.host import prepare_host, quiet_libraries

    words = spelled_out(words)
    named, overwrite = _value(words, "scores", ""), _value(words, "overwrite", "false")
    check(overwrite in ("true", "false"), f"overwrite ({overwrite}) must be true or false.")
    target, config = Path(named), _preferences(words, named)
    quiet_libraries()
    prepare_host()
    from megatron_dllm.checkpoint.loading import load_weights
    from megatron_dllm.evaluation.scores_file import write_scores
    from megatron_dllm.parallel.device import local_device
    from megatron_dllm.parallel.groups import destroy, initialize
    from megatron_dllm.parallel.meeting import meet
    from megatron_dllm.training.engine import build_chunks
    from megatron_dllm.training.scoring import decide_scoring, score_pairs
    from megatron_dllm.training.sources import Sources

    sources, meeting = Sources(config), meet(config.run)
    scoring = meeting.decide(lambda: decide_scoring(config, target, overwrite == "true", sources))
    config = replace(config, parallel=config.layout_of(config.schedule.stages[scoring.stage]))
    groups = initialize(config.parallel, config.run, meeting)
    try:
        # As for training, which then comes to the same numbers.
        chunks = build_chunks(config, groups, is_training=True)
        load_weights(scoring.weights, chunks, config.checkpoint.verify)
        by_view = score_pairs(config, scoring, chunks, groups, sources, local_device(), _keeper(scoring))
    finally:
        destroy()
    if is_rank_zero():
        with parents_made(target):
            write_scores(target, scoring.header, by_view)
        num_epochs, num_documents, num_views = scoring.header.shape
        chosen, rejected = by_view[:, ::2].mean(), by_view[:, 1::2].mean()
        Console(highlight=False, soft_wrap=True).print(
            Text(
                f"{num_documents // 2:,} pairs, {num_epochs} epochs, {num_views} views, scored by {scoring.weights}: "
                f"{chosen:.4f} nats on average for the chosen answers, {rejected:.4f} for the rejected ones; written "
                f"to {target}"
            )
        )


def _keeper(scoring: Scoring) -> Callable[[NDArray[np.float32], Mapping[str, Any]], None]:
    """Keeps [e, d, k] fp32 scores, and where they stand, every few minutes: what has taken hours is not lost."""
    from megatron_dllm.evaluation.scores_file import write_begun

    last = time.monotonic()

    def keep(by_view: NDArray[np.float32], position: Mapping[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN:
            scoring.target.parent.mkdir(parents=True, exist_ok=True)
            write_begun(scoring.target, scoring.header, by_view, position)
            last = time.monotonic()

    return keep


def _value(words: Sequence[str], key: str, default: str) -> str:
    """What the last word of a key says."""
    return next((word.partition("=")[2] for word in reversed(words) if word.startswith(f"{key}=")), default)


def _preferences(words: Sequence[str], target: str) -> TrainConfig:
    """The configuration of the run that will read the scores."""
    folder, rest = split_folder([word for word in words if word.partition("=")[0] not in _OWN_WORDS])
    named = any(word.startswith("preference.reference=") for word in rest)
    check(not named, f"preference.reference names what scores={target} is to write; leave it out.")
    composed = compose_dict([*rest, f"preference.reference={target}"], recipes=folder)
    if target.endswith(_SUFFIX):
        fill(composed.data, train=target.removesuffix(_SUFFIX))
    config = to_train_config(composed)
    config.validate(world_size())
    return config

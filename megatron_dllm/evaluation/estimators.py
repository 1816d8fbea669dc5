"""From a named estimator to the noise that computes it, and which continuations are scored together.

All but left_to_right estimate the same ELBO without bias. They differ in how many noisy views they take and in what is
left to chance (`diffusion.noise`, `diffusion.exact_views`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dllm.config.likelihood import (
    AUTO,
    COUNTS,
    EXACT,
    LEFT_TO_RIGHT,
    MOST_ENUMERATED,
    STRATIFIED,
    T_UNIFORM,
    LikelihoodConfig,
)
from megatron_dllm.diffusion import exact_views
from megatron_dllm.diffusion.noise_spec import SPREAD, NoiseSpec
from megatron_dllm.evaluation.continuations import Continuation


@dataclass(frozen=True)
class Pass:
    """Continuations that are scored with the same views.

    Attributes:
        places: which of all continuations.
        noise: None: an autoregressive model, which has none.
        is_exact: nothing is left to chance.
    """

    places: tuple[int, ...]
    noise: NoiseSpec | None
    is_exact: bool

    @property
    def num_views(self) -> int:
        """Scores of each continuation."""
        return 1 if self.noise is None else self.noise.num_views


def plan_passes(
    continuations: Sequence[Continuation], settings: LikelihoodConfig, block_size: int, context_length: int
) -> list[Pass]:
    """Share continuations out by the views they take: every mask of small blocks, or so many drawn views.

    Args:
        continuations: that fit the window.
        settings: validated.
        block_size: of the grid.
        context_length: where the last block ends at the latest.

    Raises:
        ValueError: a block has more tokens than all masks of it could be enumerated for.
    """
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place, item in enumerate(continuations):
        largest = max(item.num_scored(block_size, settings.fill, context_length))
        name = settings.estimator
        if name == AUTO:
            name = EXACT if largest <= settings.exact_up_to else STRATIFIED
        if name == EXACT and largest > MOST_ENUMERATED:
            raise ValueError(
                f"{item.name}: likelihood.estimator (exact) enumerates the 2^n - 1 masks of a block, and one has "
                f"{largest} tokens to score, more than {MOST_ENUMERATED}; use auto, or a smaller block_size."
            )
        groups[name, _num_views(name, largest, settings)].append(place)
    return [
        Pass(tuple(places), noise_of(name, num_views), name in (EXACT, LEFT_TO_RIGHT))
        for (name, num_views), places in sorted(groups.items())
    ]


def _num_views(name: str, largest: int, settings: LikelihoodConfig) -> int:
    if name == EXACT:
        return exact_views.views_needed(exact_views.ENUMERATED, largest)
    return largest if name == LEFT_TO_RIGHT else settings.num_views


def noise_of(name: str, num_views: int) -> NoiseSpec:
    """The noise of an estimator.

    Levels are drawn block by block, and not spread over neighbours: a score depends on nothing but the continuation,
    and the choices of a question have the same levels in the same blocks, however long they are.
    """
    relation = {
        EXACT: exact_views.ENUMERATED,
        LEFT_TO_RIGHT: exact_views.LEFT_TO_RIGHT,
        STRATIFIED: SPREAD,
        COUNTS: "independent",
        T_UNIFORM: "independent",
    }[name]
    return NoiseSpec(
        t_unit="block",
        is_stratified=False,
        at_least_one=name != T_UNIFORM,
        loss_weight="elbo",
        t_min=0.0,
        t_max=1.0,
        num_views=num_views,
        view_relation=relation,
        is_count=name != T_UNIFORM,
    )

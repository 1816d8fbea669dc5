"""Rules for how a stage's noise levels are drawn and which tokens of a block they mask first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_dllm.config.rules import check, check_choice

if TYPE_CHECKING:
    from megatron_dllm.config.schedule import StageConfig

T_DENSITIES = ("uniform", "bell")
# A narrower bell would weigh levels at the ends of [0, 1] by more than a thousand.
NARROWEST_BELL = 0.05
_ROUNDING = 1e-9
# Of larger ones some tokens of a block are hardly ever masked, and then weigh hundreds.
LARGEST_ORDER_BIAS = 10.0


def check_levels(prefix: str, stage: StageConfig) -> None:
    """Raise ValueError for a density, a rise or an order that cannot be, or that the stage has no use for.

    Args:
        prefix: name of the stage in messages.
        stage: with its noise.
    """
    check_choice(f"{prefix}.t_density", stage.t_density, T_DENSITIES)
    _check_bell(prefix, stage)
    _check_rise(prefix, stage)
    _check_order(prefix, stage)
    _check_resampling(prefix, stage)
    check(
        0.0 < stage.cart_p < 1.0,
        f"{prefix}.cart_p ({stage.cart_p:g}) must lie in (0, 1): it is the share of a direct neighbour in the weight; "
        "0.3 is common.",
    )
    for name, value, default in (
        ("t_density", stage.t_density, "uniform"),
        ("t_max_start", stage.t_max_start, None),
        ("order_bias", stage.order_bias, 0.0),
    ):
        is_used = value != default
        check(
            not is_used or stage.objective != "ar",
            f"{prefix}.{name} ({value}) needs the block_diffusion objective; an AR stage masks nothing.",
        )
        check(
            not is_used or stage.preference is None or not stage.preference.is_count,
            f"{prefix}.{name} ({value}) has no meaning with preference.is_count, which draws how many tokens are "
            f"masked and no level; leave {name} out, or set preference.is_count to false.",
        )


def band_of_counts(size: int, t_min: float, t_max: float) -> tuple[int, int]:
    """Least and most masked tokens of a block of `size` whose share lies in the band; least > most: none does."""
    return max(1, math.ceil(size * t_min - _ROUNDING)), math.floor(size * t_max + _ROUNDING)


def warn_levels(prefix: str, stage: StageConfig) -> list[str]:
    """Settings without effect, a sentence each."""
    uses = (("t_density", "bell", ("t_bell_center", "t_bell_width")), ("loss_weight", "cart", ("cart_p",)))
    return [
        f"{prefix}.{name} ({getattr(stage, name):g}) has no effect with {key} {getattr(stage, key)}; use {needed}."
        for key, needed, names in uses
        for name in names
        if getattr(stage, key) != needed and getattr(stage, name) != getattr(type(stage), name)
    ]


def _check_bell(prefix: str, stage: StageConfig) -> None:
    check(
        stage.t_min <= stage.t_bell_center <= stage.t_max or stage.t_density != "bell",
        f"{prefix}.t_bell_center ({stage.t_bell_center:g}) must lie in [t_min, t_max] = [{stage.t_min:g}, "
        f"{stage.t_max:g}]; use {(stage.t_min + stage.t_max) / 2:g}.",
    )
    check(
        stage.t_bell_width >= NARROWEST_BELL,
        f"{prefix}.t_bell_width ({stage.t_bell_width:g}) must be at least {NARROWEST_BELL:g}, or rare levels weigh "
        f"more than a thousand times what others do; use {NARROWEST_BELL:g}.",
    )


def _check_rise(prefix: str, stage: StageConfig) -> None:
    start, share = stage.t_max_start, stage.t_max_ramp_share
    check(
        0.0 <= share <= 1.0,
        f"{prefix}.t_max_ramp_share ({share:g}) must lie in [0, 1]: it is the share of the stage over which t_max "
        "rises.",
    )
    check(
        (start is None) == (share == 0.0),
        f"{prefix}.t_max_start ({'null' if start is None else f'{start:g}'}) and t_max_ramp_share ({share:g}) go "
        "together: from which level t_max rises, and over which share of the stage; give both or neither.",
    )
    if start is None:
        return
    check(
        stage.t_min < start <= stage.t_max,
        f"{prefix}.t_max_start ({start:g}) must lie in (t_min, t_max] = ({stage.t_min:g}, {stage.t_max:g}]; it is the "
        "largest level at the stage's beginning.",
    )
    check(
        stage.preference is None,
        f"{prefix}.t_max_start ({start:g}) must be null with preference, whose scores are of one range of levels.",
    )
    check(
        not stage.is_complementary,
        f"{prefix}.t_max_start ({start:g}) needs a view_relation other than complementary, whose range of levels must "
        "be symmetric about 0.5; leave it null.",
    )


def _check_order(prefix: str, stage: StageConfig) -> None:
    bias = stage.order_bias
    if bias == 0.0:
        return
    check(
        abs(bias) <= LARGEST_ORDER_BIAS,
        f"{prefix}.order_bias ({bias:g}) must lie in [-{LARGEST_ORDER_BIAS:g}, {LARGEST_ORDER_BIAS:g}]; beyond that "
        "some tokens are hardly ever masked.",
    )
    check(
        not stage.is_complementary,
        f"{prefix}.order_bias ({bias:g}) needs a view_relation other than complementary: the complement of a tilted "
        "mask is tilted the other way; use independent or stratified.",
    )
    check(
        stage.loss_weight == "elbo",
        f"{prefix}.order_bias ({bias:g}) needs loss_weight elbo, whose weights keep the loss a bound, and the stage's "
        f"is {stage.loss_weight}; use elbo.",
    )


def _check_resampling(prefix: str, stage: StageConfig) -> None:
    if not stage.resample_masks:
        return
    key = f"{prefix}.resample_masks (true)"
    check(stage.objective != "ar", f"{key} needs the block_diffusion objective; an AR stage masks nothing.")
    for name, value, default in (
        ("view_relation", stage.view_relation if stage.is_complementary else "stratified", "stratified"),
        ("t_density", stage.t_density, "uniform"),
        ("t_max_start", stage.t_max_start, None),
        ("order_bias", stage.order_bias, 0.0),
        ("preference", stage.preference and "given", None),
    ):
        check(value == default, f"{key} draws counts in one band, and {name} ({value}) asks for others; leave one out.")
    least, most = band_of_counts(stage.block_size, stage.t_min, stage.t_max)
    check(
        least <= most,
        f"{prefix}.t_min, t_max ({stage.t_min:g}, {stage.t_max:g}) hold no share of masked tokens of a block of "
        f"{stage.block_size}, and {key} wants one there; widen them, or take larger blocks.",
    )

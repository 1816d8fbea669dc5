"""How the noise of a stage is drawn, as one frozen value; `diffusion.noise` draws it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_dllm.config import NoiseConfig, StageConfig
from megatron_dllm.config.data import T_UNITS
from megatron_dllm.config.levels import T_DENSITIES
from megatron_dllm.config.schedule import LOSS_WEIGHTS, VIEW_RELATIONS
from megatron_dllm.config.sft import LOSS_PER
from megatron_dllm.diffusion.exact_views import EXACT_RELATIONS

# Fields that came later: records name them only where they are used, so that those of earlier versions stay comparable.
_NEWER = (
    "cart_p",
    "t_density",
    "t_bell_center",
    "t_bell_width",
    "t_max_start",
    "t_max_ramp_share",
    "order_bias",
    "resample_masks",
)


# A view relation of measurements alone: stratified counts, and masks that take turns (`diffusion.spread_masks`).
SPREAD = "spread"


@dataclass(frozen=True)
class NoiseSpec:
    """How the noise of one stage is drawn.

    Attributes:
        t_unit: what shares one t: "block", "document" (the segment), or "row" (all segments of a packed row).
        is_stratified: lay t out evenly over the blocks of a segment and over consecutive ordinals, instead of
            independently. Every single t stays uniform on [t_min, t_max). No effect with t_unit "row", whose
            key says nothing about a row's neighbours.
        at_least_one: every block with a maskable token has a masked one in every view (no effect on complementary
            pairs, which mask every token once anyway).
        loss_weight: "elbo": 1/t, corrected for at_least_one. "uniform": 1, no bound on the likelihood.
            "realised": see `diffusion.loss_weights`. "cart": 1 here; rows, which know the clean tokens, set it.
        t_min: smallest noise level.
        t_max: largest noise level; the ELBO is the mean over [t_min, t_max).
        num_views: noisy views of every segment, K.
        view_relation: of K > 1 views, see `diffusion.noise`; an even K is needed for "complementary".
        is_count: draw the number of masked tokens of a block uniformly, not t. See `diffusion.noise_masks`.
        fill_weight: what the weight of end-of-text tokens that fill a block is multiplied by.
        loss_per: "token", or "answer": the weights of an answer's tokens are divided by their number.
        share_levels: segments 2i and 2i + 1, by sample id and by ordinal, draw their levels alike (t_unit "block" and
            "document"); masks stay their own.
        cart_p: of the weights "cart", see `diffusion.cart`.
        t_density: how levels lie in their range, see `diffusion.level_density`.
        t_bell_center: of a bell.
        t_bell_width: of a bell.
        t_max_start: largest level at the stage's beginning; None: t_max.
        t_max_ramp_share: of the stage, over which it rises to t_max.
        order_bias: which tokens of a block stay masked longer, see `diffusion.block_order`.
        resample_masks: the share of masked tokens of a block lies in [t_min, t_max], see `diffusion.band_masks`.
    """

    t_unit: str
    is_stratified: bool
    at_least_one: bool
    loss_weight: str
    t_min: float
    t_max: float
    num_views: int
    view_relation: str = "stratified"
    is_count: bool = False
    fill_weight: float = 1.0
    loss_per: str = "token"
    share_levels: bool = False
    cart_p: float = 0.3
    t_density: str = "uniform"
    t_bell_center: float = 0.5
    t_bell_width: float = 0.15
    t_max_start: float | None = None
    t_max_ramp_share: float = 0.0
    order_bias: float = 0.0
    resample_masks: bool = False

    def __post_init__(self) -> None:
        """Assert what the configuration has refused: a specification that no mask could follow."""
        assert self.t_unit in T_UNITS, f"t_unit ({self.t_unit}) is not known"
        assert self.loss_weight in LOSS_WEIGHTS, f"loss_weight ({self.loss_weight}) is not known"
        assert 0.0 <= self.t_min <= self.t_max <= 1.0, (
            f"t_min, t_max ({self.t_min}, {self.t_max}) must satisfy 0 <= t_min <= t_max <= 1"
        )
        assert self.view_relation in (*VIEW_RELATIONS, *EXACT_RELATIONS, SPREAD), (
            f"view_relation ({self.view_relation}) is not known"
        )
        assert self.view_relation != SPREAD or self.is_count, "masks that take turns have counts"
        assert self.num_views >= 1, f"num_views ({self.num_views}) must be positive"
        assert not (self.is_complementary and self.num_views % 2), (
            f"num_views ({self.num_views}) must be even for complementary views"
        )
        assert self.loss_per in LOSS_PER, f"loss_per ({self.loss_per}) is not known"
        assert not self.is_count or self.loss_weight == "elbo", (
            f"loss_weight ({self.loss_weight}) must be elbo with is_count, which measures the ELBO"
        )
        assert self.t_density in T_DENSITIES, f"t_density ({self.t_density}) is not known"
        assert not self.is_count or (self.t_density == "uniform" and not self.order_bias), "counts have no levels"
        assert not self.order_bias or (self.loss_weight == "elbo" and not self.is_complementary), (
            f"order_bias ({self.order_bias}) needs the elbo weights and no complements"
        )

    @property
    def is_complementary(self) -> bool:
        """Whether the views come in pairs with opposite masks."""
        return self.view_relation == "complementary"

    @property
    def scales_tokens(self) -> bool:
        """Whether weights depend on more than a token's noise."""
        return self.fill_weight != 1.0 or self.loss_per != "token"

    def at(self, progress: float) -> NoiseSpec:
        """The noise when this share of the stage is done: as long as it rises, with the t_max of that moment."""
        if self.t_max_start is None or progress >= self.t_max_ramp_share:
            return self
        risen = (self.t_max - self.t_max_start) * progress / self.t_max_ramp_share
        return replace(self, t_max=self.t_max_start + risen)

    def stated(self) -> dict[str, Any]:
        """Its fields as a record names them."""
        defaults = {item.name: item.default for item in fields(self)}
        return {name: value for name, value in asdict(self).items() if name not in _NEWER or value != defaults[name]}

    @classmethod
    def for_stage(cls, noise: NoiseConfig, stage: StageConfig) -> NoiseSpec:
        """The noise of a training stage.

        Args:
            noise: settings that hold for the whole run.
            stage: a block-diffusion stage: its weights, range of t and views.

        Returns:
            The specification for `sample_noise`.
        """
        is_count = stage.preference is not None and stage.preference.is_count
        return cls(
            t_unit=noise.t_unit,
            is_stratified=noise.is_stratified,
            at_least_one=stage.at_least_one,
            loss_weight=stage.loss_weight,
            t_min=0.0 if is_count else stage.t_min,
            t_max=1.0 if is_count else stage.t_max,
            num_views=stage.num_views,
            view_relation=stage.view_relation,
            is_count=is_count,
            share_levels=stage.preference is not None and stage.preference.share_levels,
            fill_weight=1.0 if stage.sft is None else stage.sft.fill_weight,
            loss_per="token" if stage.sft is None else stage.sft.loss_per,
            cart_p=stage.cart_p,
            t_density=stage.t_density,
            t_bell_center=stage.t_bell_center,
            t_bell_width=stage.t_bell_width,
            t_max_start=stage.t_max_start,
            t_max_ramp_share=stage.t_max_ramp_share,
            order_bias=stage.order_bias,
            resample_masks=stage.resample_masks,
        )

    @classmethod
    def for_validation(cls) -> NoiseSpec:
        """The noise of the validation ELBO: over all of [0, 1], by counts, whatever the training noise is."""
        return cls(
            t_unit="block",
            is_stratified=True,
            at_least_one=True,
            loss_weight="elbo",
            t_min=0.0,
            t_max=1.0,
            num_views=1,
            is_count=True,
        )

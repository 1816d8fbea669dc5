"""The stages of a run and what is constant through all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from megatron_dllm.config.alignment import AlignmentConfig
from megatron_dllm.config.annealing import AttentionAnnealConfig
from megatron_dllm.config.blend import blend_parts
from megatron_dllm.config.cap import CapConfig
from megatron_dllm.config.clean_copies import check_clean_copies
from megatron_dllm.config.distill import CLEAN, DistillConfig
from megatron_dllm.config.levels import check_levels
from megatron_dllm.config.parallel import ParallelConfig
from megatron_dllm.config.preference import PreferenceConfig
from megatron_dllm.config.rules import (
    LARGEST_LENGTH,
    check,
    check_at_most,
    check_choice,
    check_positive,
    nearest_divisors,
)
from megatron_dllm.config.sft import SftConfig

LOSS_WEIGHTS = ("elbo", "uniform", "realised", "cart")
LR_SHAPES = ("constant", "linear", "cosine")
OBJECTIVES = ("ar", "block_diffusion")
VIEW_RELATIONS = ("independent", "stratified", "complementary")


@dataclass
class StageConfig:
    """One stage of the schedule: one row geometry, with a learning rate, batch size and noise range of its own."""

    # block_diffusion, or ar: predict the next token.
    objective: str = "block_diffusion"
    # Tokens denoised together; `block_size == context_length` is the MDLM stage (no clean copy).
    block_size: int = 1
    # Tokens of the clean copies that see each other; it divides block_size. 1: a clean token sees what it sees in an AR
    # model (context-causal, arXiv 2512.06776). Null: block_size, as a server computes finished blocks.
    clean_block_size: int | None = None
    # Length of the stage in document tokens. Give either this or num_epochs.
    num_tokens: int | None = None
    # Length of the stage in passes over its corpus, instead of num_tokens.
    num_epochs: float | None = None
    # Rows of an optimizer step, over all ranks.
    global_batch_size: int = MISSING
    # Rows of a forward pass on one rank.
    micro_batch_size: int = 1
    # Peak learning rate.
    learning_rate: float = MISSING
    # Learning rate at the stage's end, reached along `lr_shape`; null: stays at learning_rate.
    final_learning_rate: float | None = None
    # Way from learning_rate to final_learning_rate: constant, linear or cosine.
    lr_shape: str = "constant"
    # Document tokens over which the learning rate rises from 0.
    lr_warmup_tokens: int = 0
    # lr_warmup_tokens as a share of the stage, for a stage whose tokens are not known beforehand. Give one of the two.
    lr_warmup_share: float = 0.0
    # Least noise level: the probability that a token is masked.
    t_min: float = 0.001
    # Largest noise level.
    t_max: float = 1.0
    # How levels lie between t_min and t_max: uniform, or bell (more of them in the middle). The loss stays the same
    # bound on average: a level's loss is divided by its density.
    t_density: str = "uniform"
    # Level about which a bell is highest.
    t_bell_center: float = 0.5
    # Scale of a bell, a logistic distribution whose standard deviation is 1.8 times this; at 0.15 levels at the ends of
    # [0, 1] weigh up to 4.2, at 0.1 up to 15.
    t_bell_width: float = 0.15
    # Largest noise level of the stage's first step, from where it rises to t_max along a line; null: t_max throughout.
    t_max_start: float | None = None
    # Share of the stage's document tokens over which t_max rises.
    t_max_ramp_share: float = 0.0
    # Above 0, later tokens of a block stay masked longer, below 0 earlier ones, and the loss stays a bound: token i of
    # n is masked with probability t^g and weighs g/t, g = exp(-order_bias (i/(n-1) - 1/2)). 0: all alike. Up to 1.38 in
    # size t_min may be 0; beyond that the loss then has no finite variance.
    order_bias: float = 0.0
    # Weight of a masked token's NLL: elbo (1/t: a bound), uniform (1), realised (block size / masked tokens), cart (how
    # much of its context is visible: no bound).
    loss_weight: str = "elbo"
    # Of cart, the share of a direct neighbour in the weight, in (0, 1); the next ones follow geometrically.
    cart_p: float = 0.3
    # The share of masked tokens of each block lies between t_min and t_max, too, as if its mask were drawn again until
    # it does (BD3-LM); with loss_weight elbo a token weighs 1/t. No bound.
    resample_masks: bool = False
    # Every block of a view has a masked token; the weight is corrected so the ELBO stays unbiased.
    at_least_one: bool = True
    # Noisy views of every document, which share one clean copy; each costs as many tokens as the document has.
    num_views: int = 1
    # How several views hang together. stratified: their levels lie one in each part of the range. complementary: pairs
    # with opposite masks (LLaDA2.0 section 5.1).
    view_relation: str = "stratified"
    # Confidence-aware training beside the NLL (LLaDA2.0 section 5.2).
    cap: CapConfig = field(default_factory=CapConfig)
    # Alignment of noisy tokens with the model's own states of clean ones, beside the NLL (docs/methods.md).
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    # Weight of the AR loss beside the diffusion loss, each a mean over its own tokens; 0: none. It needs clean copies
    # in blocks of 1, whose tokens then predict the token after them (at most block_size tokens more a document).
    ar_weight: float = 0.0
    # Share of the clean tokens, drawn anew in every epoch, that predict their next token; their loss weighs 1 / share.
    # 0, with ar_row_share: none.
    ar_share: float = 1.0
    # Share of the document tokens that are trained in AR rows, by the same ar_weight: clean tokens alone, each document
    # once, so half as many model tokens; they have an order of their own of the same corpora.
    ar_row_share: float = 0.0
    # Distillation from the predictions of an autoregressive teacher, beside the NLL (docs/methods.md).
    distill: DistillConfig = field(default_factory=DistillConfig)
    # Opening of the mask from causal to bidirectional, where documents are one block (docs/methods.md); null: the whole
    # mask from the first step on.
    attention_anneal: AttentionAnnealConfig | None = None
    # Supervised fine-tuning on chats (LLaDA2.0 section 5.1); null: whatever may carry a loss is trained as it stands.
    sft: SftConfig | None = None
    # Preference optimisation on pairs of answers (LLaDA2.0 section 5.3); null: every answer is trained.
    preference: PreferenceConfig | None = None
    # Corpora and weights of this stage alone, in the form of data.train; null: data.train.
    train: Any = None
    # Whether the slot before a token predicts it, as in AR; null: what the objective does (ar: true, block_diffusion:
    # false). In block diffusion the first token of a block is then predicted by the clean block before it.
    shift: bool | None = None
    # Layout of this stage alone; null: the run's `parallel`. A run ends where the layout changes, and its next start
    # takes the next stage's (docs/runs.md).
    parallel: ParallelConfig | None = None
    # Ranks that this stage needs; give it for every stage or for none. Null: as many ranks as the run is started with.
    world_size: int | None = None

    @property
    def num_noisy_copies(self) -> int:
        """Noisy copies of every document: 0 in AR, otherwise one for each view."""
        return 0 if self.objective == "ar" else self.num_views

    @property
    def reads_all_outputs(self) -> bool:
        """Whether the last layer's output of tokens without a loss is read too."""
        return bool(self.alignment.weight or (self.distill.weight and self.distill.source == CLEAN))

    @property
    def is_complementary(self) -> bool:
        """Whether views come in pairs with opposite masks."""
        return self.view_relation == "complementary"

    @property
    def clean_grid(self) -> int:
        """`clean_block_size` with its default filled in."""
        return self.block_size if self.clean_block_size is None else self.clean_block_size

    @property
    def clean_target_share(self) -> float:
        """Share of the clean tokens beside noisy ones that predict their next token; 0: none does."""
        return self.ar_share if self.ar_weight and self.clean_grid == 1 else 0.0

    @property
    def is_shifted(self) -> bool:
        """`shift` with its default filled in."""
        return self.objective == "ar" if self.shift is None else self.shift

    @property
    def is_left_to_right(self) -> bool:
        """Whether it trains an autoregressive model, as block diffusion does with a shift and blocks of one token."""
        return self.objective == "ar" or (self.is_shifted and self.block_size == 1)

    def validate(self, name: str, context_length: int) -> None:
        """Raise ValueError with the stage's name if a value is impossible."""
        prefix = f"schedule.stages.{name}"
        check_choice(f"{prefix}.objective", self.objective, OBJECTIVES)
        check_choice(f"{prefix}.lr_shape", self.lr_shape, LR_SHAPES)
        self._check_length(prefix)
        for key in ("block_size", "global_batch_size", "micro_batch_size", "learning_rate"):
            check_positive(f"{prefix}.{key}", getattr(self, key))
        check(
            self.lr_warmup_tokens >= 0,
            f"{prefix}.lr_warmup_tokens ({self.lr_warmup_tokens}) must not be negative; 0 starts at learning_rate.",
        )
        check(
            self.final_learning_rate is None or self.final_learning_rate >= 0.0,
            f"{prefix}.final_learning_rate ({self.final_learning_rate}) must not be negative; 0 is the least.",
        )
        check(
            context_length % self.block_size == 0,
            f"{prefix}.block_size ({self.block_size}) must divide context_length ({context_length}); "
            f"use {nearest_divisors(context_length, self.block_size)}.",
        )
        check(
            self.global_batch_size % self.micro_batch_size == 0,
            f"{prefix}.micro_batch_size ({self.micro_batch_size}) must divide global_batch_size "
            f"({self.global_batch_size}).",
        )
        check(
            self.lr_shape == "constant" or self.final_learning_rate is not None,
            f"{prefix}.final_learning_rate (null) is needed with lr_shape {self.lr_shape}; give the last value.",
        )
        if self.train is not None:
            blend_parts(f"{prefix}.train", self.train)
        self._check_noise(prefix)
        check_clean_copies(prefix, self, context_length)
        self.cap.validate(f"{prefix}.cap", self.objective)
        if self.sft is not None:
            self.sft.validate(prefix, self.objective, self.cap.coefficient)
        if self.preference is not None:
            self._check_preference(prefix, self.preference)
        if self.attention_anneal is not None:
            self.attention_anneal.validate(
                f"{prefix}.attention_anneal",
                self.objective,
                self.block_size,
                context_length,
                is_preference=self.preference is not None,
            )
        self.alignment.validate(
            f"{prefix}.alignment",
            self.objective,
            has_clean=self.block_size < context_length,
            loss_per="token" if self.sft is None else self.sft.loss_per,
            is_preference=self.preference is not None,
        )
        self.distill.validate(prefix, self)

    def _check_preference(self, prefix: str, preference: PreferenceConfig) -> None:
        """The fields that decide what the score of an answer is."""
        key = f"{prefix}.preference"
        preference.validate(key, self.objective, self.num_views, self.view_relation)
        check(
            self.sft is not None and self.sft.loss_per == "token" and self.sft.fill_weight == 1.0,
            f"{prefix}.sft must be given with {key}, with loss_per token and fill_weight 1: an answer's score is the "
            "sum over its tokens, those behind its end included.",
        )
        check(
            self.cap.coefficient == 0.0,
            f"{prefix}.cap.coefficient ({self.cap.coefficient:g}) must be 0 with {key}, whose loss is of answers and "
            "not of tokens; train the one after the other.",
        )
        check(
            self.loss_weight == "elbo",
            f"{prefix}.loss_weight ({self.loss_weight}) must be elbo with {key}, which compares ELBOs.",
        )
        check(
            not preference.is_count or (self.t_min <= 0.001 and self.t_max == 1.0),
            f"{prefix}.t_min, t_max ({self.t_min}, {self.t_max}) have no effect with {key}.is_count, which covers the "
            "whole range; leave them out, or set is_count to false.",
        )
        check(
            self.global_batch_size >= 2,
            f"{prefix}.global_batch_size ({self.global_batch_size}) must be at least 2 with {key}: the two answers of "
            "a pair may need a row each.",
        )

    def _check_length(self, prefix: str) -> None:
        """The fields that say how long the stage and its warmup last."""
        check(
            (self.num_tokens is None) != (self.num_epochs is None),
            f"{prefix}.num_tokens ({self.num_tokens}) and num_epochs ({self.num_epochs}) must not both be "
            f"{'null' if self.num_tokens is None else 'given'}: a stage lasts so many document tokens, or so many "
            "passes over its corpus; give one of them.",
        )
        check_positive(f"{prefix}.num_tokens", 1 if self.num_tokens is None else self.num_tokens)
        check_positive(f"{prefix}.num_epochs", 1 if self.num_epochs is None else self.num_epochs)
        check(
            self.num_epochs is None or self.world_size is None,
            f"{prefix}.num_epochs ({self.num_epochs}) must be null with world_size ({self.world_size}): who starts the "
            "ranks has to know in which stage the run stands; give num_tokens.",
        )
        check(
            0.0 <= self.lr_warmup_share < 1.0,
            f"{prefix}.lr_warmup_share ({self.lr_warmup_share}) must lie in [0, 1); the warmup ends inside its stage.",
        )
        check(
            not (self.lr_warmup_share and self.lr_warmup_tokens),
            f"{prefix}.lr_warmup_tokens ({self.lr_warmup_tokens}) and lr_warmup_share ({self.lr_warmup_share}) are the "
            "same in two units, so one of them must be 0; set it to 0.",
        )

    def _check_noise(self, prefix: str) -> None:
        """The fields that say how tokens are masked and which of them are predicted where."""
        check_choice(f"{prefix}.loss_weight", self.loss_weight, LOSS_WEIGHTS)
        check_choice(f"{prefix}.view_relation", self.view_relation, VIEW_RELATIONS)
        check_positive(f"{prefix}.num_views", self.num_views)
        check(
            0.0 <= self.t_min < self.t_max <= 1.0,
            f"{prefix}.t_min, t_max ({self.t_min}, {self.t_max}) must satisfy 0 <= t_min < t_max <= 1.",
        )
        check(
            self.objective != "ar" or self.num_views == 1,
            f"{prefix}.num_views ({self.num_views}) needs the block_diffusion objective; an AR stage masks nothing.",
        )
        check(
            not self.is_complementary or self.num_views % 2 == 0,
            f"{prefix}.num_views ({self.num_views}) must be even with view_relation complementary, whose views come in "
            f"pairs; use {self.num_views + 1}.",
        )
        check(
            not self.is_complementary or abs(self.t_min + self.t_max - 1.0) < 0.01,
            f"{prefix}.t_min, t_max ({self.t_min}, {self.t_max}) must be symmetric about 0.5 with complementary "
            f"masking, since the second view's mask ratio is 1 - t; use t_max = {1.0 - self.t_min:g}.",
        )
        check_levels(prefix, self)
        check(
            self.is_shifted or self.objective != "ar",
            f"{prefix}.shift (false) must be true or null for objective ar, in which position i predicts token i + 1; "
            "leave it null.",
        )


@dataclass
class ScheduleConfig:
    """The stages in order, and the two lengths that stay the same through all of them."""

    # Longest segment of a document; longer documents are split at multiples of it.
    context_length: int = MISSING
    # Tokens the model sees in a row (noisy, clean and padding); null: 2 x context_length.
    row_length: int | None = None
    # By name, in the order in which they are trained.
    stages: dict[str, StageConfig] = field(default_factory=dict)
    # Document tokens of all stages together: each keeps its share, and its lr_warmup_tokens change with it. Null: as
    # the stages say.
    num_tokens: int | None = None
    # Peak learning rate of every stage; null: as the stages say.
    learning_rate: float | None = None
    # Rows of an optimizer step of every stage; null: as the stages say.
    global_batch_size: int | None = None
    # Rows of a forward pass on one rank of every stage; null: as the stages say.
    micro_batch_size: int | None = None
    # Where the model's max_position_embeddings is below context_length: lower context_length to the largest power of
    # two within it and row_length in proportion, and leave out stages of larger blocks.
    is_fitted_to_model: bool = False

    @property
    def tokens_per_row(self) -> int:
        """row_length with its default filled in."""
        return self.row_length if self.row_length is not None else 2 * self.context_length

    def validate(self) -> None:
        """Raise ValueError for stages that cannot be packed into the rows."""
        for key, length in (("context_length", self.context_length), ("row_length", self.tokens_per_row)):
            check_positive(f"schedule.{key}", length)
            check_at_most(f"schedule.{key}", length, LARGEST_LENGTH)
        for key in ("num_tokens", "learning_rate", "global_batch_size", "micro_batch_size"):
            value = getattr(self, key)
            check(
                value is None or value > 0, f"schedule.{key} ({value}) must be positive; null leaves it to the stages."
            )
        check(len(self.stages) > 0, "schedule.stages ({}) must name at least one stage; choose a schedule group.")
        counts = {name: stage.world_size for name, stage in self.stages.items()}
        silent = [name for name, count in counts.items() if count is None]
        check(
            not silent or len(silent) == len(counts),
            f"schedule.stages.{silent[0] if silent else ''}.world_size (null) must be given where other stages give "
            f"theirs ({', '.join(f'{name}: {count}' for name, count in counts.items() if count is not None)}): null "
            "is the number of ranks of whichever start comes, and those will differ; give each stage its number.",
        )
        self._check_shift()
        for name, stage in self.stages.items():
            stage.validate(name, self.context_length)
            needed = self.context_length * max(stage.num_noisy_copies, 1)
            if stage.objective == "block_diffusion":
                needed += self.context_length - (1 if stage.clean_target_share else stage.block_size)
            check(
                self.tokens_per_row >= needed,
                f"schedule.row_length ({self.tokens_per_row}) must hold the longest segment of stage {name}: "
                f"{max(stage.num_noisy_copies, 1)} view(s) and the clean blocks of context_length "
                f"{self.context_length} take {needed} tokens; raise row_length or lower context_length.",
            )

    def _check_shift(self) -> None:
        """What a slot predicts may change from a left-to-right stage to the next one, and never again."""
        first: dict[bool, str] = {}
        for name, stage in self.stages.items():
            if not stage.is_left_to_right:
                first.setdefault(stage.is_shifted, name)
        check(
            len(first) < 2,
            f"schedule.stages.{first.get(True)}.shift (true) must be that of stage {first.get(False)} (false): a model "
            "that predicts a token at another slot has to learn it anew; give all stages of blocks the same.",
        )

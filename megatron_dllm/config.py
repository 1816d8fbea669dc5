"""Every dataclass of the configuration, with units, defaults and the rules that a run must satisfy.

Hydra composes YAML onto these classes (strict: an unknown key is an error); `TrainConfig.validate`
checks what types cannot, before any process group or device exists. Every failure is a ValueError
that says name (value), the rule, and the remedy.

Token counts are *document tokens*: tokens of the corpus, counted once however many noisy or clean
copies of them the model sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from megatron_dllm.exit_codes import EXIT_FENCED as EXIT_FENCED
from megatron_dllm.exit_codes import EXIT_NON_FINITE as EXIT_NON_FINITE
from megatron_dllm.exit_codes import EXIT_PREEMPTED as EXIT_PREEMPTED
from megatron_dllm.nearest_layout import as_overrides, nearest_layout

ATTENTION_BACKENDS = ("auto", "dense", "chunked", "shared_prefix", "flex")
BLOCK_ORIGINS = ("document", "row")
CONTEXT_PARALLEL_METHODS = ("gather", "ulysses")
FAMILIES = ("bailing_moe", "llada2_moe", "qwen3_moe", "sdar_moe", "qwen3")
LOSS_WEIGHTS = ("elbo", "uniform", "realised")
TOKEN_DISPATCHERS = ("auto", "allgather", "alltoall")
LR_SHAPES = ("constant", "linear", "cosine")
NON_FINITE_ACTIONS = ("stop", "skip")
OBJECTIVES = ("ar", "block_diffusion")
PRECISIONS = ("fp32", "bf16")
SCORE_FUNCTIONS = ("sigmoid", "softmax")
T_UNITS = ("block", "document", "row")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _check(value in choices, f"{name} ({value}) is not known; use one of {', '.join(choices)}.")


def _check_positive(name: str, value: float) -> None:
    _check(value > 0, f"{name} ({value}) must be positive; give a value above 0.")


@dataclass
class ModelConfig:
    """The transformer, in megatron-core's names; `family` names the HF tensor layout it came from.

    Sizes are counts of features unless said otherwise. `num_dense_layers` layers from the bottom
    have a dense MLP, the others a mixture of experts (`num_moe_experts == 0`: all dense).
    """

    family: str = "bailing_moe"
    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING
    kv_channels: int = MISSING
    vocab_size: int = MISSING
    max_position_embeddings: int = 32768
    qk_layernorm: bool = True
    layernorm_epsilon: float = 1e-6
    rotary_base: float = 600000.0
    rotary_percent: float = 0.5
    tie_word_embeddings: bool = False
    num_dense_layers: int = 0
    num_moe_experts: int = 0
    moe_ffn_hidden_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_router_topk: int = 0
    moe_router_num_groups: int = 0
    moe_router_group_topk: int = 0
    moe_router_topk_scaling_factor: float = 1.0
    moe_router_score_function: str = "sigmoid"
    moe_router_pre_softmax: bool = False
    moe_router_enable_expert_bias: bool = True
    moe_router_bias_update_rate: float = 0.0
    moe_router_dtype: str = "fp32"
    moe_aux_loss_coeff: float = 0.0
    moe_z_loss_coeff: float = 0.0
    init_method_std: float = 0.02
    mask_token_id: int = MISSING
    eos_token_id: int = MISSING
    pad_token_id: int = MISSING
    attention_backend: str = "auto"
    # Compute the last layer's outputs only where a token carries a loss (exact; false for comparisons).
    skip_unused_outputs: bool = True
    # Standard deviation of the noise added to the embedding of masked tokens, as a fraction of the
    # mean norm of the embedding rows; falls linearly to 0 (LLaDA2.0 section 7.1).
    mask_embedding_noise: float = 0.0
    mask_embedding_noise_steps: int = 0

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return self.num_moe_experts > 0

    def validate(self) -> None:
        """Raise ValueError where the sizes contradict each other or megatron-core would differ from HF."""
        _check_choice("model.family", self.family, FAMILIES)
        _check_choice("model.attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
                     "num_query_groups", "kv_channels", "vocab_size"):
            _check_positive(f"model.{name}", getattr(self, name))
        _check(self.num_attention_heads % self.num_query_groups == 0,
               f"model.num_query_groups ({self.num_query_groups}) must divide num_attention_heads "
               f"({self.num_attention_heads}); every query group serves the same number of heads.")
        _check(0.0 < self.rotary_percent <= 1.0,
               f"model.rotary_percent ({self.rotary_percent}) must lie in (0, 1]; it is HF's partial_rotary_factor.")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            _check(0 <= value < self.vocab_size,
                   f"model.{name} ({value}) must lie in [0, vocab_size) = [0, {self.vocab_size}); "
                   "take it from the tokenizer.")
        _check(self.mask_token_id != self.eos_token_id,
               f"model.mask_token_id ({self.mask_token_id}) equals eos_token_id; "
               "the mask token must be a token of its own.")
        _check(self.mask_embedding_noise >= 0.0,
               f"model.mask_embedding_noise ({self.mask_embedding_noise}) must not be negative; 0 turns it off.")
        if self.is_moe:
            self._validate_moe()

    def _validate_moe(self) -> None:
        _check_choice("model.moe_router_score_function", self.moe_router_score_function, SCORE_FUNCTIONS)
        _check(0 <= self.num_dense_layers < self.num_layers,
               f"model.num_dense_layers ({self.num_dense_layers}) must lie in [0, num_layers) = "
               f"[0, {self.num_layers}); for a dense model set num_moe_experts to 0.")
        _check_positive("model.moe_ffn_hidden_size", self.moe_ffn_hidden_size)
        _check(0 < self.moe_router_topk <= self.num_moe_experts,
               f"model.moe_router_topk ({self.moe_router_topk}) must lie in [1, num_moe_experts] = "
               f"[1, {self.num_moe_experts}].")
        if self.moe_router_num_groups:
            _check(self.num_moe_experts % self.moe_router_num_groups == 0,
                   f"model.moe_router_num_groups ({self.moe_router_num_groups}) must divide num_moe_experts "
                   f"({self.num_moe_experts}).")
            _check(0 < self.moe_router_group_topk <= self.moe_router_num_groups,
                   f"model.moe_router_group_topk ({self.moe_router_group_topk}) must lie in "
                   f"[1, moe_router_num_groups] = [1, {self.moe_router_num_groups}].")
            _check(self.moe_router_topk == 2 * self.moe_router_group_topk,
                   f"model.moe_router_topk ({self.moe_router_topk}) must be twice moe_router_group_topk "
                   f"({self.moe_router_group_topk}): megatron-core ranks a group by its best topk/group_topk "
                   "experts, the published models by its best 2, and only this ratio agrees.")


@dataclass
class DataConfig:
    """Tokenized corpora (.bin/.idx prefixes, without suffix) and how rows are filled."""

    train: str = MISSING
    validation: str | None = None
    tokenizer: str | None = None
    # Documents packed together into rows; more fill rows better, and mix lengths further apart.
    packing_chunk: int = 1024
    block_origin: str = "document"
    # Store the clean copy of a block only if a later block of its document reads it (exact).
    prune_clean: bool = True
    num_workers: int = 0

    def validate(self) -> None:
        """Raise ValueError for values no corpus could satisfy; files are checked when opened."""
        _check_choice("data.block_origin", self.block_origin, BLOCK_ORIGINS)
        _check_positive("data.packing_chunk", self.packing_chunk)
        _check(self.num_workers >= 0,
               f"data.num_workers ({self.num_workers}) must not be negative; 0 builds rows in the training process.")


@dataclass
class NoiseConfig:
    """How tokens are masked. `t` is the probability that a token is masked (linear schedule)."""

    t_unit: str = "block"
    # Lay t out evenly: over the blocks of a document and, by a low-discrepancy sequence, over documents.
    is_stratified: bool = True
    # Every block of a single view has a masked token; the weight is corrected so the ELBO stays unbiased.
    at_least_one: bool = True
    loss_weight: str = "elbo"

    def validate(self) -> None:
        """Raise ValueError for an unknown choice."""
        _check_choice("noise.t_unit", self.t_unit, T_UNITS)
        _check_choice("noise.loss_weight", self.loss_weight, LOSS_WEIGHTS)


@dataclass
class StageConfig:
    """One stage of the schedule: constant row geometry, its own learning rate, batch and noise range."""

    objective: str = "block_diffusion"
    # Tokens denoised together; `block_size == context_length` is the MDLM stage (no clean copy).
    block_size: int = 1
    num_tokens: int = MISSING
    global_batch_size: int = MISSING
    micro_batch_size: int = 1
    learning_rate: float = MISSING
    # Learning rate at the stage's end, reached along `lr_shape`; None: stays at learning_rate.
    final_learning_rate: float | None = None
    lr_shape: str = "constant"
    lr_warmup_tokens: int = 0
    t_min: float = 0.001
    t_max: float = 1.0
    # Two noisy views with opposite masks that share one clean copy (LLaDA2.0 section 5.1).
    is_complementary: bool = False
    # Layout of this stage alone; null: the run's `parallel`. A run ends where the layout changes, and its next start
    # takes the next stage's (docs/runs.md).
    parallel: ParallelConfig | None = None
    # Ranks this stage needs, where stages differ in that: then every stage gives its own. Null: as many as the run is
    # started with.
    world_size: int | None = None

    @property
    def num_views(self) -> int:
        """Noisy copies of every document: 0 for AR, 2 with complementary masking."""
        if self.objective == "ar":
            return 0
        return 2 if self.is_complementary else 1

    def validate(self, name: str, context_length: int) -> None:
        """Raise ValueError with the stage's name where a value is impossible."""
        prefix = f"schedule.stages.{name}"
        _check_choice(f"{prefix}.objective", self.objective, OBJECTIVES)
        _check_choice(f"{prefix}.lr_shape", self.lr_shape, LR_SHAPES)
        for key in ("block_size", "num_tokens", "global_batch_size", "micro_batch_size", "learning_rate"):
            _check_positive(f"{prefix}.{key}", getattr(self, key))
        _check(context_length % self.block_size == 0,
               f"{prefix}.block_size ({self.block_size}) must divide context_length ({context_length}); "
               f"use {_nearest_divisors(context_length, self.block_size)}.")
        _check(self.global_batch_size % self.micro_batch_size == 0,
               f"{prefix}.micro_batch_size ({self.micro_batch_size}) must divide global_batch_size "
               f"({self.global_batch_size}).")
        _check(0.0 <= self.t_min < self.t_max <= 1.0,
               f"{prefix}.t_min, t_max ({self.t_min}, {self.t_max}) must satisfy 0 <= t_min < t_max <= 1.")
        _check(self.objective != "ar" or not self.is_complementary,
               f"{prefix}.is_complementary (true) needs the block_diffusion objective; an AR stage masks nothing.")
        _check(not self.is_complementary or abs(self.t_min + self.t_max - 1.0) < 0.01,
               f"{prefix}.t_min, t_max ({self.t_min}, {self.t_max}) must be symmetric about 0.5 with complementary "
               f"masking, since the second view's mask ratio is 1 - t; use t_max = {1.0 - self.t_min:g}.")
        _check(self.lr_shape == "constant" or self.final_learning_rate is not None,
               f"{prefix}.final_learning_rate (null) is needed with lr_shape {self.lr_shape}; give the last value.")


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0] or [1]
    below = max(d for d in divisors if d <= max(wanted, 1))
    above = min((d for d in divisors if d >= wanted), default=number)
    return f"{below} or {above}"


def _nearest_multiples(number: int, unit: int) -> str:
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


@dataclass
class ScheduleConfig:
    """The stages in order, and the two lengths that stay the same through all of them."""

    # Longest piece of a document; longer documents are split at multiples of it.
    context_length: int = MISSING
    # Tokens the model sees in a row (noisy, clean and padding); null: 2 x context_length.
    row_length: int | None = None
    stages: dict[str, StageConfig] = field(default_factory=dict)

    @property
    def tokens_per_row(self) -> int:
        """row_length with its default filled in."""
        return self.row_length if self.row_length is not None else 2 * self.context_length

    def validate(self) -> None:
        """Raise ValueError for stages that cannot be packed into the rows."""
        _check_positive("schedule.context_length", self.context_length)
        _check(len(self.stages) > 0, "schedule.stages ({}) must name at least one stage; choose a schedule group.")
        counts = {name: stage.world_size for name, stage in self.stages.items()}
        silent = [name for name, count in counts.items() if count is None]
        _check(not silent or len(silent) == len(counts),
               f"schedule.stages.{silent[0] if silent else ''}.world_size (null) must be given where other stages give "
               f"theirs ({', '.join(f'{name}: {count}' for name, count in counts.items() if count is not None)}): null "
               "is the number of ranks of whichever start comes, and those will differ; give each stage its number.")
        for name, stage in self.stages.items():
            stage.validate(name, self.context_length)
            needed = self.context_length * max(stage.num_views, 1)
            if stage.objective == "block_diffusion":
                needed += self.context_length - stage.block_size
            _check(self.tokens_per_row >= needed,
                   f"schedule.row_length ({self.tokens_per_row}) must hold the longest piece of stage {name}: "
                   f"{max(stage.num_views, 1)} view(s) and the clean blocks of context_length "
                   f"{self.context_length} take {needed} tokens; raise row_length or lower context_length.")


@dataclass
class OptimizerConfig:
    """AdamW in megatron-core's distributed optimizer, its state sharded over the data-parallel ranks."""

    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    # What to do with a step whose loss or gradient norm is not finite: stop the run, or skip the step.
    on_non_finite: str = "stop"
    # A gradient norm this many times its running median counts as a spike and is treated alike; 0: off.
    spike_factor: float = 0.0

    def validate(self) -> None:
        """Raise ValueError for values Adam cannot use."""
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            _check(0.0 <= value < 1.0, f"optimizer.{name} ({value}) must lie in [0, 1).")
        _check_positive("optimizer.adam_eps", self.adam_eps)
        _check_choice("optimizer.on_non_finite", self.on_non_finite, NON_FINITE_ACTIONS)
        _check(self.clip_grad >= 0, f"optimizer.clip_grad ({self.clip_grad}) must not be negative; 0 turns it off.")
        _check(not self.overlap_param_gather or self.overlap_grad_reduce,
               "optimizer.overlap_param_gather (true) needs overlap_grad_reduce; set both to true.")


@dataclass
class ParallelConfig:
    """Sizes of the parallel layout, in megatron-core's names. Data parallel size is what is left."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    # How attention sees the tokens of the other context-parallel ranks. gather: every rank gets all keys and values
    # and keeps its queries; ulysses: every rank gets all tokens of some heads.
    context_parallel_method: str = "gather"
    # How tokens reach their experts; auto: alltoall with CUDA (sends only what is needed), allgather without.
    moe_token_dispatcher: str = "auto"
    precision: str = "fp32"
    # none | selective (core attention) | full (every layer's input only is kept).
    recompute: str = "none"

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the dense weights and one row: TP x PP x CP."""
        return (self.tensor_model_parallel_size * self.pipeline_model_parallel_size
                * self.context_parallel_size)

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas that read different rows."""
        return world_size // self.model_parallel_size

    def validate_choices(self) -> None:
        """Refuse what is wrong on every number of ranks."""
        _check_choice("parallel.precision", self.precision, PRECISIONS)
        _check_choice("parallel.recompute", self.recompute, ("none", "selective", "full"))
        _check_choice("parallel.context_parallel_method", self.context_parallel_method, CONTEXT_PARALLEL_METHODS)
        _check_choice("parallel.moe_token_dispatcher", self.moe_token_dispatcher, TOKEN_DISPATCHERS)

    def validate(self, world_size: int, model: ModelConfig) -> None:
        """Refuse layouts that megatron-core would refuse late or train wrongly."""
        self.validate_choices()
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
                     "expert_model_parallel_size"):
            _check_positive(f"parallel.{name}", getattr(self, name))
        _check(world_size % self.model_parallel_size == 0,
               f"parallel: tensor x pipeline x context ({self.tensor_model_parallel_size} x "
               f"{self.pipeline_model_parallel_size} x {self.context_parallel_size} = {self.model_parallel_size}) must "
               f"divide the number of ranks ({world_size}); start a multiple of {self.model_parallel_size} ranks.")
        self._validate_tensor(model)
        self._validate_context(model)
        self._validate_pipeline(model)
        self._validate_experts(world_size, model)

    def _validate_tensor(self, model: ModelConfig) -> None:
        tp = self.tensor_model_parallel_size
        for name in ("num_attention_heads", "ffn_hidden_size", "vocab_size", "moe_shared_expert_intermediate_size"):
            value = getattr(model, name)
            _check(value % tp == 0,
                   f"parallel.tensor_model_parallel_size ({tp}) must divide model.{name} ({value}).")
        groups = model.num_query_groups
        _check(groups % tp == 0 or tp % groups == 0,
               f"parallel.tensor_model_parallel_size ({tp}) must divide model.num_query_groups ({groups}) "
               "or be a multiple of it.")
        _check(not self.sequence_parallel or tp > 1,
               f"parallel.sequence_parallel (true) needs tensor_model_parallel_size above 1 (it is {tp}); "
               "set it to false.")
        _check(not (model.is_moe and tp > 1) or self.sequence_parallel,
               f"parallel.sequence_parallel (false) must be true for a mixture of experts with "
               f"tensor_model_parallel_size {tp}: megatron-core does not train it otherwise; set it to true.")

    def _validate_context(self, model: ModelConfig) -> None:
        cp, tp = self.context_parallel_size, self.tensor_model_parallel_size
        if self.context_parallel_method != "ulysses" or cp == 1:
            return
        heads, groups = model.num_attention_heads // tp, max(1, model.num_query_groups // tp)
        _check(heads % cp == 0 and (groups % cp == 0 or cp % groups == 0),
               f"parallel.context_parallel_size ({cp}) must divide the {heads} attention heads of a tensor rank, and "
               f"divide its {groups} query groups or be a multiple of them, with context_parallel_method ulysses; "
               "use another size, or gather.")

    def _validate_pipeline(self, model: ModelConfig) -> None:
        pp = self.pipeline_model_parallel_size
        vpp = self.virtual_pipeline_model_parallel_size
        first, last = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        _check(vpp is None or (pp > 1 and vpp > 1),
               f"parallel.virtual_pipeline_model_parallel_size ({vpp}) must be above 1 and needs "
               f"pipeline_model_parallel_size above 1 (it is {pp}); set it to null for one stage a rank.")
        for name, number in (("first", first), ("last", last)):
            _check(number is None or (number > 0 and number % (vpp or 1) == 0),
                   f"parallel.num_layers_in_{name}_pipeline_stage ({number}) must be positive and a multiple of the "
                   f"virtual stages ({vpp or 1}); set it to null to share the layers out evenly.")
            _check(number is None or pp > 1,
                   f"parallel.num_layers_in_{name}_pipeline_stage ({number}) needs pipeline_model_parallel_size above "
                   f"1 (it is {pp}); set it to null.")
        middle = pp - (first is not None) - (last is not None)
        layers = model.num_layers - (first or 0) - (last or 0)
        if middle == 0:
            _check(layers == 0,
                   f"parallel.num_layers_in_first/last_pipeline_stage ({first}, {last}) must add up to "
                   f"model.num_layers ({model.num_layers}).")
            _check(vpp is None,
                   f"parallel.num_layers_in_last_pipeline_stage ({last}) must be null with virtual stages ({vpp}) "
                   f"where no stage lies between the first ({first} layers) and the last: megatron-core divides by the "
                   "number of those; set it to null, and the last stage takes the rest.")
            return
        _check(layers > 0 and layers % (middle * (vpp or 1)) == 0,
               f"parallel.pipeline_model_parallel_size ({pp}, virtual {vpp or 1}, first {first}, last {last}) must "
               f"divide the layers left for the middle stages ({layers} of {model.num_layers}).")

    def _validate_experts(self, world_size: int, model: ModelConfig) -> None:
        ep = self.expert_model_parallel_size
        tp = self.tensor_model_parallel_size
        if not model.is_moe:
            _check(ep == 1, f"parallel.expert_model_parallel_size ({ep}) needs a model with experts; set it to 1.")
            return
        if self.expert_tensor_parallel_size is not None:
            _check_positive("parallel.expert_tensor_parallel_size", self.expert_tensor_parallel_size)
        etp = self.expert_tensor_parallel_size or tp
        _check(model.num_moe_experts % ep == 0,
               f"parallel.expert_model_parallel_size ({ep}) must divide model.num_moe_experts "
               f"({model.num_moe_experts}).")
        _check(ep > 1 or etp == tp,
               f"parallel.expert_tensor_parallel_size ({etp}) must equal tensor_model_parallel_size ({tp}) when "
               "expert_model_parallel_size is 1: megatron-core 0.16 would reduce the experts' gradients over the ranks "
               f"of the dense weights and train wrongly without an error; set it to {tp} or use expert parallelism.")
        _check(model.moe_ffn_hidden_size % etp == 0,
               f"parallel.expert_tensor_parallel_size ({etp}) must divide model.moe_ffn_hidden_size "
               f"({model.moe_ffn_hidden_size}).")
        expert_ranks = ep * etp * self.pipeline_model_parallel_size
        _check(world_size % expert_ranks == 0,
               f"parallel: expert x expert-tensor x pipeline ({ep} x {etp} x {self.pipeline_model_parallel_size} = "
               f"{expert_ranks}) must divide the number of ranks ({world_size}); "
               f"start a multiple of {expert_ranks} ranks or use less expert parallelism.")


@dataclass
class CheckpointConfig:
    """What is saved, when, and what a run starts from."""

    # Start from these weights (a torch_dist checkpoint folder); null: random weights.
    load: str | None = None
    # Continue from the run folder's latest checkpoint if there is one.
    resume: bool = True
    # Save every so many document tokens, besides the end of every stage; 0: only there.
    save_interval_tokens: int = 0
    # Checkpoints kept: the last n, the k with the best validation ELBO, every m-th of those saved at the interval
    # (0: none for that reason).
    keep_last: int = 2
    keep_best: int = 5
    keep_every: int = 0
    # Write in a background process while training goes on.
    is_async: bool = False
    # Compare checksums of every file before loading it, and of another rank's files before a synchronous save counts.
    verify: bool = True
    # A writer that has not finished after so many minutes is dead: the run stops with an error. In a synchronous save
    # ranks wait for the slowest, and run.distributed_timeout_minutes limits that as well.
    timeout_minutes: float = 30.0

    def validate(self) -> None:
        """Raise ValueError where nothing would be kept."""
        _check(self.keep_last >= 1,
               f"checkpoint.keep_last ({self.keep_last}) must be at least 1, or a run could not be resumed.")
        for name in ("keep_best", "keep_every", "save_interval_tokens"):
            value = getattr(self, name)
            _check(value >= 0, f"checkpoint.{name} ({value}) must not be negative; 0 turns it off.")
        _check_positive("checkpoint.timeout_minutes", self.timeout_minutes)


@dataclass
class EvaluationConfig:
    """Validation ELBO: exact in expectation, with the same noise for every checkpoint."""

    # Block sizes at which the ELBO is measured; the first is the target that ranks checkpoints.
    block_sizes: list[int] = field(default_factory=lambda: [32])
    # Document tokens of held-out text, the same whole documents at every block size; 0: no validation.
    num_tokens: int = 0
    micro_batch_size: int = 1

    def validate(self, context_length: int, has_validation: bool) -> None:
        """Raise ValueError for block sizes that do not fit, or tokens without a corpus."""
        _check(self.num_tokens == 0 or has_validation,
               f"evaluation.num_tokens ({self.num_tokens}) needs data.validation; "
               "name a held-out corpus or set it to 0.")
        _check(len(self.block_sizes) > 0, "evaluation.block_sizes ([]) must name at least the target block size.")
        for block_size in self.block_sizes:
            _check(block_size > 0 and context_length % block_size == 0,
                   f"evaluation.block_sizes ({block_size}) must divide context_length ({context_length}); "
                   f"use {_nearest_divisors(context_length, block_size)}.")


@dataclass
class LoggingConfig:
    """Where metrics go. metrics.jsonl is always written."""

    interval_steps: int = 10
    tensorboard: bool = True
    wandb_mode: str = "disabled"
    wandb_project: str = "megatron_dllm"

    def validate(self) -> None:
        """Raise ValueError for an unknown W&B mode."""
        _check_positive("logging.interval_steps", self.interval_steps)
        _check_choice("logging.wandb_mode", self.wandb_mode, ("disabled", "offline", "online"))


@dataclass
class RunConfig:
    """Identity of a run: everything it writes lies under `root`/`name`."""

    name: str = MISSING
    root: str = "runs"
    seed: int = 1234
    # Backend of the process groups; auto: nccl with CUDA, gloo without.
    distributed_backend: str = "auto"
    distributed_timeout_minutes: float = 10.0

    def validate(self) -> None:
        """Raise ValueError for a name that is no plain folder name."""
        plain = bool(self.name) and all(c.isalnum() or c in "._-" for c in self.name) and self.name[0] not in ".-"
        _check(plain, f"run.name ({self.name!r}) must be letters, digits, '.', '_' or '-', "
                      "not starting with '.' or '-'; it names a folder.")
        _check_choice("run.distributed_backend", self.distributed_backend, ("auto", "gloo", "nccl"))
        _check(0 <= self.seed < 2**63, f"run.seed ({self.seed}) must lie in [0, 2^63).")


@dataclass
class TrainConfig:
    """The whole of a training run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def validate(self, world_size: int) -> None:
        """Check the whole configuration for `world_size` ranks, before any device or process group exists.

        Raises:
            ValueError: naming the field, its value, the rule and the remedy.
        """
        self.run.validate()
        self.model.validate()
        self.data.validate()
        self.noise.validate()
        self.schedule.validate()
        self.optimizer.validate()
        self.checkpoint.validate()
        self.evaluation.validate(self.schedule.context_length, self.data.validation is not None)
        self.logging.validate()
        _check(self.schedule.context_length <= self.model.max_position_embeddings,
               f"schedule.context_length ({self.schedule.context_length}) must not exceed "
               f"model.max_position_embeddings ({self.model.max_position_embeddings}).")
        for name, stage in self.schedule.stages.items():
            self._validate_stage_layout(name, stage, world_size)

    def layout_of(self, stage: StageConfig) -> ParallelConfig:
        """The parallel layout in which a stage runs."""
        return stage.parallel if stage.parallel is not None else self.parallel

    def _validate_stage_layout(self, name: str, stage: StageConfig, run_world_size: int) -> None:
        if stage.world_size is not None:
            _check_positive(f"schedule.stages.{name}.world_size", stage.world_size)
        layout, world_size = self.layout_of(stage), stage.world_size or run_world_size
        _check(layout.precision == self.parallel.precision,
               f"schedule.stages.{name}.parallel.precision ({layout.precision}) must be the run's "
               f"({self.parallel.precision}); a run keeps its precision.")
        layout.validate_choices()
        try:
            self._check_sizes(name, layout, world_size)
        except ValueError as error:
            place = "" if layout is self.parallel and world_size == run_world_size else (
                f"schedule.stages.{name}, on {world_size} ranks: ")
            raise ValueError(f"{place}{error} {self._layout_that_works(name, layout, world_size)}") from None
        self._check_batch(name, stage, layout, world_size)

    def _layout_that_works(self, name: str, wish: ParallelConfig, world_size: int) -> str:
        """The remedy for a refused layout: the nearest one that suits every stage which shares it."""
        sharing = {other: stage for other, stage in self.schedule.stages.items() if self.layout_of(stage) is wish}

        def check(layout: ParallelConfig) -> None:
            for other, stage in sharing.items():
                self._check_sizes(other, layout, stage.world_size or world_size)
                self._check_batch(other, stage, layout, stage.world_size or world_size)

        layout = nearest_layout(wish, world_size, self.model, check)
        if layout is None:
            return (f"On {world_size} ranks no layout works with these global_batch_size and micro_batch_size; make "
                    f"each global_batch_size a multiple of {world_size} x micro_batch_size, or start another number of "
                    "ranks.")
        prefix = "parallel" if wish is self.parallel else f"schedule.stages.{name}.parallel"
        return f"On {world_size} ranks this works: {as_overrides(wish, layout, prefix)}"

    def _check_sizes(self, name: str, layout: ParallelConfig, world_size: int) -> None:
        layout.validate(world_size, self.model)
        split = layout.tensor_model_parallel_size * layout.context_parallel_size
        row_length = self.schedule.tokens_per_row
        _check(row_length % split == 0,
               f"schedule.row_length ({row_length}) must be a multiple of tensor x context parallel size ({split}) in "
               f"stage {name}; use {-(-row_length // split) * split}.")

    @staticmethod
    def _check_batch(name: str, stage: StageConfig, layout: ParallelConfig, world_size: int) -> None:
        dp = layout.data_parallel_size(world_size)
        rows = dp * stage.micro_batch_size
        _check(stage.global_batch_size % rows == 0,
               f"schedule.stages.{name}.global_batch_size ({stage.global_batch_size}) must be a multiple of "
               f"data parallel size x micro_batch_size ({dp} x {stage.micro_batch_size} = {rows}); "
               f"use {_nearest_multiples(stage.global_batch_size, rows)}.")
        pp = layout.pipeline_model_parallel_size
        _check(layout.virtual_pipeline_model_parallel_size is None or stage.global_batch_size // rows % pp == 0,
               f"schedule.stages.{name}.global_batch_size ({stage.global_batch_size}) must give a multiple of "
               f"pipeline_model_parallel_size ({pp}) micro-batches to each rank with virtual pipeline stages, and "
               f"gives {stage.global_batch_size // rows}; "
               f"use {_nearest_multiples(stage.global_batch_size, rows * pp)}.")


@dataclass
class DecodingConfig:
    """How a block of masks becomes tokens. Lengths count tokens, probabilities lie in [0, 1]."""

    # A step keeps every predicted token whose probability exceeds this, and at least `min_tokens_per_step` of them.
    threshold: float = 0.95
    min_tokens_per_step: int = 1
    max_new_tokens: int = 256
    # 0 takes the most probable token; above 0 samples, within `top_p` and `top_k` (0: the whole vocabulary).
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 1234

    def validate(self) -> None:
        """Raise ValueError for values no decoding could follow."""
        _check(0.0 < self.threshold <= 1.0,
               f"threshold ({self.threshold}) must lie in (0, 1]; 1 accepts min_tokens_per_step tokens a step.")
        for name in ("min_tokens_per_step", "max_new_tokens"):
            _check_positive(name, getattr(self, name))
        _check(0.0 <= self.temperature < float("inf"),
               f"temperature ({self.temperature}) must be finite and not negative; 0 takes the most probable token.")
        _check(0.0 < self.top_p <= 1.0, f"top_p ({self.top_p}) must lie in (0, 1]; 1 keeps the whole distribution.")
        _check(self.top_k >= 0, f"top_k ({self.top_k}) must not be negative; 0 keeps the whole vocabulary.")
        _check(0 <= self.seed < 2**63, f"seed ({self.seed}) must lie in [0, 2^63).")


@dataclass
class GenerateConfig(DecodingConfig):
    """What `megatron_dllm.generate` loads, decodes and writes."""

    # An HF folder, a run folder, its checkpoints folder, or one torch_dist checkpoint folder.
    checkpoint: str = MISSING
    # Exactly one of the two: a text, or a file with one prompt a line (.jsonl: an object with "prompt" a line).
    prompt: str | None = None
    prompts_file: str | None = None
    # JSON lines, one for each prompt; the file must not exist yet.
    output: str | None = None
    # Null: the folder that lies beside the weights.
    tokenizer: str | None = None
    # Null: what the checkpoint was trained for.
    block_size: int | None = None
    # Prompt and generated tokens together; null: the model's max_position_embeddings.
    context_length: int | None = None
    # Null: fp32 on a CPU, bf16 on a GPU.
    precision: str | None = None
    attention_backend: str = "auto"

    def validate(self) -> None:
        """Raise ValueError where the request is incomplete or contradicts itself; files are checked when opened."""
        super().validate()
        _check(self.checkpoint not in ("", MISSING), "checkpoint (not given) is required: name an HF or a run folder.")
        _check((self.prompt is None) != (self.prompts_file is None),
               f"prompt ({self.prompt!r}) and prompts_file ({self.prompts_file!r}): give exactly one of the two.")
        _check(self.prompt != "", "prompt ('') is empty; give at least one token to continue from.")
        for name in ("block_size", "context_length"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"{name} ({value}) must be positive; null takes the checkpoint's.")
        _check(self.precision is None or self.precision in PRECISIONS,
               f"precision ({self.precision}) is not known; use one of {', '.join(PRECISIONS)}, or null.")
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)

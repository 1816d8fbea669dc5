"""What a run is called, and how it steps, saves, evaluates and logs."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from megatron_dllm.config.rules import check, check_choice, check_name, check_positive, nearest_divisors

NON_FINITE_ACTIONS = ("stop", "skip")
OFFLOADS = ("none", "cpu")
HOST_ADAMS = ("torch", "deepspeed")
MOMENTS = ("fp32", "bf16")
GRADIENTS = ("fp32", "bf16")
# Held-out tokens that are measured where a recipe names the corpus and not their number.
HELD_OUT_TOKENS = 2_000_000


@dataclass
class RunConfig:
    """Identity of a run: everything it writes lies under `root`/`name`."""

    # Name of the run: its folder below root, and its job on a cluster.
    name: str = MISSING
    # Folder that holds the runs.
    root: str = "runs"
    # Decides order, noise and initial weights, together with what is trained on; 0 to 2^63 - 1.
    seed: int = 1234
    # Backend of the process groups; auto: nccl with CUDA, gloo without.
    distributed_backend: str = "auto"
    # Minutes after which a collective that some rank never joins ends the run.
    distributed_timeout_minutes: float = 10.0
    # On a GPU, take operations that give the same bits each time, where torch has them: a resume then repeats a run's
    # steps exactly, more slowly. Operations without such a form are named in a warning. A CPU's do in any case.
    is_deterministic: bool = False

    def validate(self) -> None:
        """Raise ValueError if the name is not a plain folder name."""
        check_name("run.name", self.name)
        check_choice("run.distributed_backend", self.distributed_backend, ("auto", "gloo", "nccl"))
        check(0 <= self.seed < 2**63, f"run.seed ({self.seed}) must lie in [0, 2^63).")
        check_positive("run.distributed_timeout_minutes", self.distributed_timeout_minutes)


@dataclass
class OptimizerConfig:
    """AdamW in megatron-core's distributed optimizer, its state sharded over the data-parallel ranks."""

    # Decay of the mean of the gradients, in [0, 1).
    adam_beta1: float = 0.9
    # Decay of the mean of their squares, in [0, 1).
    adam_beta2: float = 0.95
    # Added to the root of the mean of squares.
    adam_eps: float = 1e-8
    # Share of the weights that is taken off in a step, times the learning rate; 0: off.
    weight_decay: float = 0.1
    # Largest norm of the gradient of a step, to which longer ones are shortened; 0: off.
    clip_grad: float = 1.0
    # Reduce gradients over the data-parallel ranks while the backward pass goes on.
    overlap_grad_reduce: bool = False
    # Gather updated weights while the next forward pass goes on; needs overlap_grad_reduce.
    overlap_param_gather: bool = False
    # Where fp32 weights and moments lie and are updated: none, in the GPU's memory; cpu, in the host's, 12 bytes a
    # parameter of the rank's shard, which leaves the GPU as much more room and makes a step longer.
    offload: str = "none"
    # Share of the parameters whose state is offloaded, in (0, 1].
    offload_fraction: float = 1.0
    # What updates them there: torch (its fused kernel) or deepspeed (CPUAdam, from the package of that name).
    offload_adam: str = "torch"
    # Precision in which Adam's two moments are kept: fp32, or bf16 by TransformerEngine's Adam, 4 bytes less a
    # parameter of the rank's shard. Checkpoints hold fp32 in any case.
    moments: str = "fp32"
    # Precision in which gradients are summed over micro-batches and over ranks: fp32, or bf16, which takes two bytes
    # less a parameter and half of the traffic, and rounds after every micro-batch. The update is computed in fp32.
    gradients: str = "fp32"
    # Factors on the learning rate by parameter, as {glob: factor}: the last glob that matches a parameter's name in
    # checkpoints counts, 1 where none does. 0 leaves weights as they are, and keeps their moments.
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    # What to do with a step whose loss or gradient norm is not finite: stop the run, or skip the step.
    on_non_finite: str = "stop"
    # A gradient norm above this many times its running median is a spike and treated the same way; 0: off.
    spike_factor: float = 0.0

    def validate(self) -> None:
        """Raise ValueError for values Adam cannot use."""
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            check(0.0 <= value < 1.0, f"optimizer.{name} ({value}) must lie in [0, 1).")
        check_positive("optimizer.adam_eps", self.adam_eps)
        check_choice("optimizer.on_non_finite", self.on_non_finite, NON_FINITE_ACTIONS)
        self._validate_offload()
        for name in ("clip_grad", "weight_decay", "spike_factor"):
            value = getattr(self, name)
            check(value >= 0, f"optimizer.{name} ({value}) must not be negative; 0 turns it off.")
        for glob, factor in self.lr_multipliers.items():
            check(
                factor >= 0.0,
                f"optimizer.lr_multipliers ({glob}: {factor:g}) must not be negative; 0 leaves weights as they are.",
            )
        check(
            not self.overlap_param_gather or self.overlap_grad_reduce,
            "optimizer.overlap_param_gather (true) needs overlap_grad_reduce; set both to true.",
        )

    @property
    def offloaded(self) -> float:
        """Share of the parameters whose state lies in the host's memory."""
        return self.offload_fraction if self.offload == "cpu" else 0.0

    def _validate_offload(self) -> None:
        check_choice("optimizer.offload", self.offload, OFFLOADS)
        check_choice("optimizer.offload_adam", self.offload_adam, HOST_ADAMS)
        check_choice("optimizer.moments", self.moments, MOMENTS)
        check_choice("optimizer.gradients", self.gradients, GRADIENTS)
        check(
            self.gradients == "fp32" or self.offload == "none",
            f"optimizer.gradients ({self.gradients}) must be fp32 with optimizer.offload {self.offload}, whose Adam "
            "reads fp32; set one of the two back.",
        )
        check(
            self.moments == "fp32" or self.offload == "none",
            f"optimizer.moments ({self.moments}) must be fp32 with optimizer.offload {self.offload}, whose Adam keeps "
            "fp32; set one of the two back.",
        )
        check(
            0.0 < self.offload_fraction <= 1.0,
            f"optimizer.offload_fraction ({self.offload_fraction}) must lie in (0, 1]; offload=none offloads nothing.",
        )


@dataclass
class CheckpointConfig:
    """What is saved, when, and what a run starts from."""

    # Start from these weights (a torch_dist checkpoint folder or a run folder); null: random weights.
    load: str | None = None
    # Let the weights of `load` take the model's rotary_base and rotary_scaling instead of their own, to train or to
    # measure longer contexts (docs/long_context.md).
    change_rotary: bool = False
    # Continue from the run folder's latest checkpoint if there is one.
    resume: bool = True
    # Save every so many document tokens, and at the end of every stage; 0: only at the end of stages.
    save_interval_tokens: int = 0
    # Checkpoints kept because they are the last, so many.
    keep_last: int = 2
    # Checkpoints kept for the best validation ELBO, so many; 0: none for that reason.
    keep_best: int = 5
    # Every m-th checkpoint of those saved at the interval is kept; 0: none for that reason.
    keep_every: int = 0
    # Write in a background process while training goes on.
    is_async: bool = False
    # Compare checksums of every file before loading it, and of another rank's files before a synchronous save counts.
    verify: bool = True
    # A writer that has not finished after so many minutes is dead: the run stops with an error. In a synchronous save
    # ranks wait for the slowest, and run.distributed_timeout_minutes limits that as well.
    timeout_minutes: float = 30.0

    def validate(self) -> None:
        """Raise ValueError if no checkpoint would be kept."""
        check(
            self.keep_last >= 1,
            f"checkpoint.keep_last ({self.keep_last}) must be at least 1, or a run could not be resumed.",
        )
        for name in ("keep_best", "keep_every", "save_interval_tokens"):
            value = getattr(self, name)
            check(value >= 0, f"checkpoint.{name} ({value}) must not be negative; 0 turns it off.")
        check_positive("checkpoint.timeout_minutes", self.timeout_minutes)


@dataclass
class EvaluationConfig:
    """Validation ELBO: exact in expectation, with the same noise for every checkpoint."""

    # Block sizes at which the ELBO is measured; the first is the target that ranks checkpoints.
    block_sizes: list[int] = field(default_factory=lambda: [32])
    # Document tokens of held-out text, the same ones at every block size; 0: no validation. The last document is cut
    # where they are reached, but a chat is measured whole. A recipe that leaves it out measures 2 million where it
    # names data.validation.
    num_tokens: int = 0
    # Rows of a forward pass on one rank.
    micro_batch_size: int = 1
    # Clean tokens that see each other while the ELBO is measured; it divides every block size. Null: the block size, as
    # a server computes finished blocks, whatever clean_block_size a stage trains with.
    clean_block_size: int | None = None
    # At the end of stages, also measure the exact NLL of the next token by the same weights, under the name "ar": what
    # a model that is being converted keeps of its autoregressive mode.
    with_ar: bool = False

    def validate(self, context_length: int, has_validation: bool) -> None:
        """Raise ValueError for block sizes that do not fit, or tokens without a corpus."""
        check(
            self.num_tokens >= 0,
            f"evaluation.num_tokens ({self.num_tokens}) must not be negative; 0 turns validation off.",
        )
        check_positive("evaluation.micro_batch_size", self.micro_batch_size)
        check(
            self.num_tokens == 0 or has_validation,
            f"evaluation.num_tokens ({self.num_tokens}) needs data.validation; name a held-out corpus or set it to 0.",
        )
        check(len(self.block_sizes) > 0, "evaluation.block_sizes ([]) must name at least the target block size.")
        for block_size in self.block_sizes:
            check(
                block_size > 0 and context_length % block_size == 0,
                f"evaluation.block_sizes ({block_size}) must divide context_length ({context_length}); "
                f"use {nearest_divisors(context_length, block_size)}.",
            )
            check(
                self.clean_block_size is None
                or (self.clean_block_size > 0 and block_size % self.clean_block_size == 0),
                f"evaluation.clean_block_size ({self.clean_block_size}) must divide every one of block_sizes "
                f"({block_size}); null measures as a server computes.",
            )


@dataclass
class LoggingConfig:
    """Where metrics go. metrics.jsonl is always written."""

    # A line of metrics every so many optimizer steps.
    interval_steps: int = 10
    # Write events for TensorBoard into the run folder.
    tensorboard: bool = True
    # Weights & Biases: disabled, offline (files in the run folder) or online.
    wandb_mode: str = "disabled"
    # Project at Weights & Biases.
    wandb_project: str = "megatron_dllm"

    def validate(self) -> None:
        """Raise ValueError for an unknown W&B mode."""
        check_positive("logging.interval_steps", self.interval_steps)
        check_choice("logging.wandb_mode", self.wandb_mode, ("disabled", "offline", "online"))

"""What a run of lm-evaluation-harness loads, asks and writes."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from megatron_dllm.config.asking import AskingConfig
from megatron_dllm.config.evaluate import EvaluateConfig
from megatron_dllm.config.generate import DecodingConfig
from megatron_dllm.config.likelihood import LikelihoodConfig
from megatron_dllm.config.rules import check, check_positive


@dataclass
class HarnessConfig(EvaluateConfig, AskingConfig):
    """A configuration of which model, layout, tasks and estimator count; the checkpoint brings the rest."""

    # Tasks, groups and tags of lm-evaluation-harness by name, or YAML files.
    tasks: list[str] = MISSING
    # Questions of each task at the most; below 1: a share of them; null: all.
    limit: float | None = None
    # Null: the block size that the checkpoint was trained with.
    block_size: int | None = None
    # Texts that are decoded at a time, on each replica of the model.
    batch_size: int = 16
    # Resamplings for the errors of metrics that have no formula; 0: none.
    bootstrap_iters: int = 1000
    # Write every question with its scores, too.
    log_samples: bool = True
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)

    def validate(self, world_size: int) -> None:
        """Raise ValueError for what a run cannot follow; tasks are looked up when they are loaded."""
        super().validate(world_size)
        check(len(self.tasks) > 0, "tasks ([]) must name at least one task of lm-evaluation-harness or a YAML file.")
        self.validate_asking()
        check(self.bootstrap_iters >= 0, f"bootstrap_iters ({self.bootstrap_iters}) must not be negative; give 0.")
        if self.limit is not None:
            check_positive("limit", self.limit)
        check_positive("batch_size", self.batch_size)
        self.likelihood.validate()
        try:
            self.decoding.validate()
        except ValueError as error:  # the keys of decoding have no group there
            raise ValueError(f"decoding.{error}") from None

    def why_not_write(self, is_diffusion: bool) -> str | None:
        """Why such a checkpoint cannot decode texts in this layout, and what to do; None: it can."""
        if not is_diffusion:
            return (
                "the checkpoint is autoregressive: this program decodes blocks; convert it first, or ask tasks that "
                "score given choices, whose likelihoods are exact."
            )
        layout = self.parallel
        if layout.context_parallel_size > 1 or layout.virtual_pipeline_model_parallel_size:
            return (
                f"parallel.context_parallel_size ({layout.context_parallel_size}) and "
                f"virtual_pipeline_model_parallel_size ({layout.virtual_pipeline_model_parallel_size}) must be 1 and "
                "null for that; leave them out, or give such tasks a run of their own."
            )
        return None

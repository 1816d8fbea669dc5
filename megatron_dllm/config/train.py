"""The whole of a training run, and the rules between its parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_dllm.config.annealing import PAIR_BACKENDS, RANDOM
from megatron_dllm.config.blend import BlendPart, blend_parts
from megatron_dllm.config.data import DataConfig, NoiseConfig
from megatron_dllm.config.distill import TEACHER, TeacherConfig
from megatron_dllm.config.model import ModelConfig
from megatron_dllm.config.nearest_layout import as_overrides, nearest_layout
from megatron_dllm.config.parallel import FP8_BLOCK, ParallelConfig
from megatron_dllm.config.preference import FROZEN, ReferenceConfig
from megatron_dllm.config.rules import check, check_positive, check_values, nearest_multiples
from megatron_dllm.config.run import CheckpointConfig, EvaluationConfig, LoggingConfig, OptimizerConfig, RunConfig
from megatron_dllm.config.schedule import ScheduleConfig, StageConfig
from megatron_dllm.config.training import TrainingConfig


@dataclass
class TrainConfig:
    """The whole of a training run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    preference: ReferenceConfig = field(default_factory=ReferenceConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
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
        check_values(self, unbounded=("run.seed",))
        self.run.validate()
        self.model.validate()
        self.data.validate()
        self.noise.validate()
        self.training.validate()
        self.schedule.validate()
        self.optimizer.validate()
        self.checkpoint.validate()
        self.evaluation.validate(self.schedule.context_length, self.data.validation is not None)
        self.logging.validate()
        check(
            self.schedule.context_length <= self.model.max_position_embeddings,
            f"schedule.context_length ({self.schedule.context_length}) must not exceed "
            f"model.max_position_embeddings ({self.model.max_position_embeddings}); shorten the context, or raise it "
            "together with model.rotary_scaling (docs/long_context.md).",
        )
        for name, stage in self.schedule.stages.items():
            self._check_block_grid(name, stage)
            self._validate_stage_layout(name, stage, world_size)
        self._check_preferences()
        check(
            self.optimizer.gradients == "fp32" or self.parallel.precision != "fp32",
            f"optimizer.gradients ({self.optimizer.gradients}) must be fp32 with parallel.precision fp32, as gradients "
            "are no shorter than weights; use parallel.precision=bf16, or leave it out.",
        )
        for name in self.taught_stages:
            check(
                self.teacher.checkpoint is not None,
                f"teacher.checkpoint (null) must be given for schedule.stages.{name}, whose alignment or distill has "
                f"source {TEACHER}; name an autoregressive checkpoint, or take source clean.",
            )

    def _check_preferences(self) -> None:
        """What stages of preferences need of the run."""
        kinds = {name: stage.preference is not None for name, stage in self.schedule.stages.items()}
        if not any(kinds.values()):
            return
        name = next(name for name, is_preference in kinds.items() if is_preference)
        key = f"schedule.stages.{name}.preference"
        check(
            all(kinds.values()),
            f"{key} needs a run of its own: its reference is what the run starts from, and "
            f"{', '.join(other for other, is_preference in kinds.items() if not is_preference)} would train it "
            "otherwise; start a second run from the first one's checkpoint.",
        )
        check(
            self.checkpoint.load is not None,
            f"checkpoint.load (null) must name the weights that {key} starts from; give the run that was trained on "
            "chats.",
        )
        check(
            self.preference.reference is not None,
            f"preference.reference (null) must be given with {key}: the scores of checkpoint.load, or {FROZEN} for a "
            "copy of its weights in memory.",
        )
        for name, stage in self.schedule.stages.items():
            check(
                stage.preference is None or stage.preference.share_noise or self.preference.reference == FROZEN,
                f"schedule.stages.{name}.preference.share_noise (false) needs preference.reference={FROZEN}: a file of "
                "scores has those of the model's own masks.",
            )
        for setting in ("mask_embedding_noise", "moe_router_bias_update_rate"):
            value = getattr(self.training, setting)
            check(
                value == 0.0,
                f"training.{setting} ({value}) must be 0 with {key}: it would change the scores that the loss follows "
                "from.",
            )

    @property
    def taught_stages(self) -> tuple[str, ...]:
        """Names of the stages that learn from the model of `teacher.checkpoint`."""
        return tuple(
            name
            for name, stage in self.schedule.stages.items()
            if any(method.weight and method.source == TEACHER for method in (stage.alignment, stage.distill))
        )

    @property
    def has_second_model(self) -> bool:
        """Whether a frozen model lies in memory beside the one that is trained."""
        compares = any(stage.preference is not None for stage in self.schedule.stages.values())
        return bool(self.taught_stages) or (compares and self.preference.reference == FROZEN)

    def _check_block_grid(self, name: str, stage: StageConfig) -> None:
        check(
            stage.sft is None or self.data.block_origin == "document",
            f"data.block_origin ({self.data.block_origin}) must be document for schedule.stages.{name}.sft: a server "
            "counts the blocks of a chat from its beginning.",
        )
        check(
            stage.attention_anneal is None or self.data.block_origin == "document",
            f"data.block_origin ({self.data.block_origin}) must be document for schedule.stages.{name}."
            "attention_anneal: on a grid through the row a document may have more than one block.",
        )
        check(
            stage.attention_anneal is None
            or stage.attention_anneal.kind != RANDOM
            or self.training.attention_backend in PAIR_BACKENDS,
            f"training.attention_backend ({self.training.attention_backend}) must be one of {', '.join(PAIR_BACKENDS)} "
            f"with schedule.stages.{name}.attention_anneal.kind random, whose keys are no intervals; name one (flex "
            "trains on a GPU alone), or set the kind to window.",
        )

    def layout_of(self, stage: StageConfig) -> ParallelConfig:
        """The parallel layout in which a stage runs."""
        return stage.parallel if stage.parallel is not None else self.parallel

    def blend_of(self, name: str) -> tuple[BlendPart, ...]:
        """The corpora that a stage trains on, with their shares."""
        stage = self.schedule.stages[name]
        if stage.train is None:
            return blend_parts("data.train", self.data.train)
        return blend_parts(f"schedule.stages.{name}.train", stage.train)

    @property
    def train_corpora(self) -> tuple[str, ...]:
        """Prefixes of the corpora of all stages, each once, in the order of the stages."""
        parts = (part for name in self.schedule.stages for part in self.blend_of(name))
        return tuple(dict.fromkeys(part.prefix for part in parts))

    def _validate_stage_layout(self, name: str, stage: StageConfig, run_world_size: int) -> None:
        if stage.world_size is not None:
            check_positive(f"schedule.stages.{name}.world_size", stage.world_size)
        layout, world_size = self.layout_of(stage), stage.world_size or run_world_size
        check(
            layout.precision == self.parallel.precision,
            f"schedule.stages.{name}.parallel.precision ({layout.precision}) must be the run's "
            f"({self.parallel.precision}); a run keeps its precision.",
        )
        layout.validate_choices()
        try:
            self._check_sizes(name, layout, world_size)
        except ValueError as error:
            place = (
                ""
                if layout is self.parallel and world_size == run_world_size
                else (f"schedule.stages.{name}, on {world_size} ranks: ")
            )
            raise ValueError(f"{place}{error} {self._layout_that_works(name, layout, world_size)}") from None
        self._check_batch(name, stage, layout, world_size)

    def _layout_that_works(self, name: str, wish: ParallelConfig, world_size: int) -> str:
        """The remedy for a refused layout: the nearest one that works for every stage that shares it."""
        sharing = {other: stage for other, stage in self.schedule.stages.items() if self.layout_of(stage) is wish}

        def try_layout(layout: ParallelConfig) -> None:
            for other, stage in sharing.items():
                self._check_sizes(other, layout, stage.world_size or world_size)
                self._check_batch(other, stage, layout, stage.world_size or world_size)

        layout = nearest_layout(wish, world_size, self.model, try_layout)
        if layout is None:
            return (
                f"On {world_size} ranks no layout works with these global_batch_size and micro_batch_size; make "
                f"each global_batch_size a multiple of {world_size} x micro_batch_size, or start another number of "
                "ranks."
            )
        prefix = "parallel" if wish is self.parallel else f"schedule.stages.{name}.parallel"
        return f"On {world_size} ranks this works: {as_overrides(wish, layout, prefix)}"

    def check_layout(self, layout: ParallelConfig, world_size: int, stages: Iterable[str]) -> None:
        """Refuse a layout of so many ranks in which these stages cannot run.

        Raises:
            ValueError: saying what of it does not work.
        """
        for number, name in enumerate(stages):
            if number == 0:  # sizes are the same for all of them
                self._check_sizes(name, layout, world_size)
            self._check_batch(name, self.schedule.stages[name], layout, world_size)

    def _check_sizes(self, name: str, layout: ParallelConfig, world_size: int) -> None:
        layout.validate(world_size, self.model)
        split = layout.tensor_model_parallel_size * layout.context_parallel_size
        row_length = self.schedule.tokens_per_row
        check(
            row_length % split == 0,
            f"schedule.row_length ({row_length}) must be a multiple of tensor x context parallel size ({split}) in "
            f"stage {name}; use {-(-row_length // split) * split}.",
        )
        unit = FP8_BLOCK * split
        check(
            layout.precision != "fp8" or row_length % unit == 0,
            f"schedule.row_length ({row_length}) must be a multiple of {FP8_BLOCK} x tensor x context parallel size "
            f"({unit}) with parallel.precision fp8; use {-(-row_length // unit) * unit}.",
        )

    @staticmethod
    def _check_batch(name: str, stage: StageConfig, layout: ParallelConfig, world_size: int) -> None:
        dp = layout.data_parallel_size(world_size)
        rows = dp * stage.micro_batch_size
        check(
            stage.global_batch_size % rows == 0,
            f"schedule.stages.{name}.global_batch_size ({stage.global_batch_size}) must be a multiple of "
            f"data parallel size x micro_batch_size ({dp} x {stage.micro_batch_size} = {rows}); "
            f"use {nearest_multiples(stage.global_batch_size, rows)}.",
        )
        pp = layout.pipeline_model_parallel_size
        check(
            layout.virtual_pipeline_model_parallel_size is None or stage.global_batch_size // rows % pp == 0,
            f"schedule.stages.{name}.global_batch_size ({stage.global_batch_size}) must give a multiple of "
            f"pipeline_model_parallel_size ({pp}) micro-batches to each rank with virtual pipeline stages, and "
            f"gives {stage.global_batch_size // rows}; "
            f"use {nearest_multiples(stage.global_batch_size, rows * pp)}.",
        )

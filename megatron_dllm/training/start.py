"""What a start of a run will do: decided once, on rank 0, from the configuration and what lies on disk.

    start = decide_start(config, world_size, sources)

The decision reads files and writes none, needs no process group, and is a plain value that is handed to the other
ranks. The check of a configuration calls the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.identity import check_identity, check_start
from megatron_dllm.checkpoint.manifest import check_complete, fingerprint
from megatron_dllm.checkpoint.meta import CheckpointMeta, RunSemantics, Semantics, read_state
from megatron_dllm.config import ParallelConfig, StageConfig, TrainConfig
from megatron_dllm.data.ar_rows import ArRows
from megatron_dllm.data.blend_stream import BlendStream
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.source import Source, check_fills_a_row
from megatron_dllm.diffusion.block_schedule import BlockSchedule, Stage, StageRow, stage_table
from megatron_dllm.evaluation.elbo import check_corpus, validation_names
from megatron_dllm.model.objective import objective_of
from megatron_dllm.run.history import Change
from megatron_dllm.run.names import CHECKPOINTS
from megatron_dllm.training.blends import blend_changes, check_blends, check_not_exhausted
from megatron_dllm.training.epochs import chat_warnings, epoch_tokens
from megatron_dllm.training.fills import dropped_warnings, measure_fills, row_estimates
from megatron_dllm.training.past import changes_since, check_place, check_trained, read_past
from megatron_dllm.training.rate_rules import check_rates
from megatron_dllm.training.run_state import RunState
from megatron_dllm.training.scores_needed import check_scored_corpus, check_scores, needed_headers, reference_warnings
from megatron_dllm.training.sources import Sources
from megatron_dllm.training.teacher_needed import find_teacher, teacher_warnings
from megatron_dllm.training.wandb_mode import WandBMode, decide_wandb


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run continues from: its folder, where the run stood, and what its contract.json says."""

    folder: Path
    state: RunState
    stored: CheckpointMeta


@dataclass(frozen=True)
class Weights:
    """The weights that a new run starts from: their folder, and what its contract.json says."""

    folder: Path
    stored: CheckpointMeta


@dataclass(frozen=True)
class FrozenWeights:
    """The weights of a second model, which stay as they are: their folder and its fingerprint."""

    folder: Path
    fingerprint: str


@dataclass(frozen=True)
class Start:
    """What this start will do.

    Attributes:
        schedule: the stages of the run.
        layout: in which it runs: that of the next stage, or of the run where that has finished.
        resume: where it continues; None for a new run.
        weights: what a new run starts from; None: random weights.
        reference: what stages of preferences compare the model with; None where there are none.
        teacher: the checkpoint that stages are distilled from; None where there are none.
        passed_over: newer checkpoints that are damaged, and why.
        table: what each stage will do, with steps estimated by packing the first documents.
        num_corpus_tokens: of the training documents.
        changes: of the configuration since the start before.
        warnings: to be said once.
        wandb: how it uses W&B.
    """

    schedule: BlockSchedule
    layout: ParallelConfig
    resume: Resume | None
    weights: Weights | None
    reference: FrozenWeights | None
    teacher: FrozenWeights | None
    passed_over: Mapping[Path, str]
    table: tuple[StageRow, ...]
    num_corpus_tokens: int
    changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    wandb: WandBMode


def run_checkpoints(config: TrainConfig) -> Path:
    """The folder of the run's checkpoints."""
    return Path(config.run.root) / config.run.name / CHECKPOINTS


def run_semantics(config: TrainConfig) -> RunSemantics:
    """What the model's outputs mean, as far as it may not change inside one run."""
    return RunSemantics(
        block_origin=config.data.block_origin,
        mask_token_id=config.model.mask_token_id,
        context_length=config.schedule.context_length,
    )


def semantics_of(config: TrainConfig, stage: StageConfig) -> Semantics:
    """What the model's outputs mean while a stage trains it."""
    return Semantics(
        **asdict(run_semantics(config)),
        shift=objective_of(stage, config.noise).shift,
        block_size=1 if stage.is_left_to_right else stage.block_size,
        clean_block_size=None if stage.clean_grid == stage.block_size else stage.clean_grid,
    )


def changes_layout(config: TrainConfig, layout: ParallelConfig, stage: Stage, world_size: int) -> bool:
    """Whether a stage cannot continue in the given layout with so many ranks."""
    return config.layout_of(stage.config) != layout or (stage.config.world_size or world_size) != world_size


def decide_start(
    config: TrainConfig, world_size: int | None, sources: Sources, passed_over: Mapping[Path, str] | None = None
) -> Start:
    """Decide what a start of the run will do.

    Args:
        config: a configuration whose own `validate` has passed.
        world_size: ranks of this start; None: not known yet, and not compared with what the next stage asks for.
        sources: of the run.
        passed_over: checkpoints that have turned out damaged when their content was compared, and why.

    Raises:
        ValueError: a schedule, corpus, tokenizer or checkpoint that cannot work, or another number of ranks than the
            next stage asks for, saying why.
    """
    tokens = epoch_tokens(config, sources)
    schedule = BlockSchedule.from_config(config.schedule, tokens, sources.prompted_stages())
    check_sources(config, schedule, sources)
    resume, damaged = _find_resume(config, dict(passed_over or {}))
    past = read_past(run_checkpoints(config).parent)
    blends: list[str] = []
    if resume is not None:
        blends = _check_position(config, schedule, resume, sources)
        check_place(schedule, resume.stored.position, resume.folder)
        if past is not None:
            check_trained(past, schedule, resume.stored.position)
    reference = find_reference(config, resume)
    if reference is not None and config.preference.scores_file is not None:
        headers = needed_headers(config, sources, reference.fingerprint, schedule, tokens)
        check_scores(Path(config.preference.scores_file), headers)
        check_scored_corpus(resume.state.stream if resume is not None else {}, sources)
    weights = None if resume is not None else _find_weights(config)
    check_rates(config, resume is not None or (weights is not None and weights.stored.is_diffusion))
    fills = measure_fills(config, schedule, sources)
    wandb = decide_wandb(config.logging)
    next_stage = _next_stage(schedule, resume)
    if world_size is not None and next_stage is not None:
        _check_world_size(next_stage, world_size)
    return Start(
        schedule=schedule,
        layout=config.parallel if next_stage is None else config.layout_of(next_stage.config),
        resume=resume,
        weights=weights,
        reference=reference,
        teacher=find_same_teacher(config, resume),
        passed_over=damaged,
        table=tuple(stage_table(schedule, row_estimates(config, schedule, fills))),
        num_corpus_tokens=sum(source.num_tokens for source in sources.corpora.values()),
        changes=changes_since(past, config),
        warnings=(
            *schedule.warnings(),
            *reference_warnings(config),
            *teacher_warnings(config),
            *chat_warnings(config, sources),
            *blends,
            *dropped_warnings(fills),
            *filter(None, [wandb.warning]),
        ),
        wandb=wandb,
    )


def check_sources(config: TrainConfig, schedule: BlockSchedule, sources: Sources) -> None:
    """Refuse documents that are damaged, or too few for a stage's rows or a validation's."""
    trained, held_out = sources.corpora, sources.validation
    for source in (*trained.values(), *([] if held_out is None else [held_out])):
        source.verify()
    for stage in schedule.stages:
        for part in sources.of_stage(stage.name):
            _check_pairs(stage, part.source)
            geometry = RowGeometry.of_stage(stage.config, config.schedule, config.data)
            check_fills_a_row(part.source, geometry.ar_rows() if isinstance(part.source, ArRows) else geometry)
    check_not_exhausted(config, sources)
    if held_out is None:
        return
    for stage in schedule.stages:
        names = validation_names(config, stage.config)
        check_corpus(config, held_out, names, stage.config.sft, stage.config.is_shifted)


def _check_pairs(stage: Stage, source: Source) -> None:
    """Refuse documents that are no pairs in a stage that compares answers; pairs may be trained as chats."""
    key = f"schedule.stages.{stage.name}.preference"
    if stage.config.preference is not None and not source.is_paired:
        raise ValueError(
            f"{key} needs pairs of answers, and corpus {source.name} holds none; tokenize pairs with --kind pairs, or "
            f"set {key}=null."
        )


def _find_resume(config: TrainConfig, passed_over: dict[Path, str]) -> tuple[Resume | None, dict[Path, str]]:
    """The run's newest checkpoint whose files are all there, and the newer ones that are damaged.

    What a checkpoint holds is compared with its checksums when it is loaded, by all ranks together.
    """
    checkpoints = run_checkpoints(config)
    found = folders.step_folders(checkpoints)[::-1]
    if found and not config.checkpoint.resume:
        raise ValueError(
            f"checkpoint.resume (false) starts anew, but run.name ({config.run.name}) has checkpoints in "
            f"{checkpoints}; choose another name, or remove them."
        )
    for folder in found:
        if folder in passed_over:
            continue
        try:
            check_complete(folder)
        except ValueError as error:
            passed_over[folder] = str(error)
            continue
        stored = check_identity(folder, config.model, run_semantics(config))
        _check_same_stage(folder, stored, config)
        _check_precision(folder, stored, config)
        return Resume(folder, RunState.from_json(read_state(folder)), stored), passed_over
    if passed_over:
        raise ValueError(
            f"{checkpoints} holds no whole checkpoint: all of {[folder.name for folder in passed_over]} are damaged "
            f"({'; '.join(passed_over.values())}). Restore one of them, or remove the folder to start the run anew."
        )
    return None, passed_over


def _find_weights(config: TrainConfig) -> Weights | None:
    if not config.checkpoint.load:
        return None
    folder = folders.resolve_checkpoint(Path(config.checkpoint.load))
    check_complete(folder)
    return Weights(folder, check_start(folder, config))


def find_reference(config: TrainConfig, resume: Resume | None) -> FrozenWeights | None:
    """What preferences are compared with: the weights that the run started from, also where it goes on.

    Raises:
        ValueError: they are gone, damaged, of another model, or others than those that the run started from.
    """
    if not any(stage.preference for stage in config.schedule.stages.values()):
        return None
    assert config.checkpoint.load is not None, "the configuration has refused it"
    folder = folders.resolve_checkpoint(Path(config.checkpoint.load))
    check_complete(folder)
    check_start(folder, config)
    found = fingerprint(folder)
    if resume is not None and resume.state.reference not in ("", found):
        raise ValueError(
            f"checkpoint.load ({config.checkpoint.load}) has other weights ({folder.name}, {found[:12]}) than the run "
            f"started from ({resume.state.reference[:12]}), which its preferences are compared with; name that "
            "checkpoint."
        )
    return FrozenWeights(folder, found)


def find_same_teacher(config: TrainConfig, resume: Resume | None) -> FrozenWeights | None:
    """The second model that stages learn from, which stays the same one where a run goes on.

    Raises:
        ValueError: what `find_teacher` refuses, or other weights than those that have taught the run.
    """
    folder = find_teacher(config)
    if folder is None:
        return None
    found = fingerprint(folder)
    if resume is not None and resume.state.teacher not in ("", found):
        raise ValueError(
            f"teacher.checkpoint ({config.teacher.checkpoint}) has other weights ({folder.name}, {found[:12]}) than "
            f"the model that has taught this run ({resume.state.teacher[:12]}); name that checkpoint, or start a new "
            "run from the weights."
        )
    return FrozenWeights(folder, found)


def _check_same_stage(folder: Path, stored: CheckpointMeta, config: TrainConfig) -> None:
    """Refuse to continue in a schedule whose stage of that name is another one than the checkpoint was trained in."""
    name = stored.position.stage
    if name is None:
        return
    if name not in config.schedule.stages:
        raise ValueError(
            f"schedule.stages has no {name}, the stage of the checkpoint {folder}; continue with the "
            "run's own schedule (its config.yaml), or start a new run from the weights."
        )
    ours = semantics_of(config, config.schedule.stages[name])
    for field, attribute in (("shift", "shift"), ("block_size", "block_size"), ("clean_block_size", "clean_grid")):
        value, found = getattr(ours, attribute), getattr(stored.semantics, attribute)
        if value != found:
            raise ValueError(
                f"schedule.stages.{name}: {field} ({value}) differs from the checkpoint {folder} "
                f"({found}); continue with the run's own schedule (its config.yaml), or start "
                "a new run from the weights."
            )


def _check_precision(folder: Path, stored: CheckpointMeta, config: TrainConfig) -> None:
    precision = stored.provenance.precision or config.parallel.precision
    if precision != config.parallel.precision:
        raise ValueError(
            f"parallel.precision ({config.parallel.precision}) differs from the checkpoint {folder} "
            f"({precision}); a run keeps its precision: start a new one from the weights."
        )


def _check_position(config: TrainConfig, schedule: BlockSchedule, resume: Resume, sources: Sources) -> list[str]:
    """Refuse a position in other rows than this configuration gives; returns what differs and is allowed to."""
    stream = new_stream(config, sources)
    stream.load_state_dict(resume.state.stream)
    next_stage = _next_stage(schedule, resume)
    to_train = [] if next_stage is None else [stage.name for stage in schedule.stages[next_stage.index :]]
    changes = blend_changes(config, sources, resume.state, to_train)
    check_blends(changes, config, resume.folder)
    return changes


def new_stream(config: TrainConfig, sources: Sources) -> BlendStream:
    """The run's sequence of rows, at its beginning."""
    data = config.data
    corpora = [*sources.corpora.values(), *sources.ar_rows.values()]
    return BlendStream(corpora, config.run.seed, data.packing_chunk, is_repeating=data.on_exhausted == "repeat")


def _next_stage(schedule: BlockSchedule, resume: Resume | None) -> Stage | None:
    """The stage that this start begins with; None when the run has finished."""
    consumed = resume.state.consumed_tokens if resume is not None else 0
    return None if schedule.is_finished(consumed) else schedule.stage_at(consumed)


def _check_world_size(stage: Stage, world_size: int) -> None:
    wanted = stage.config.world_size
    if wanted is not None and wanted != world_size:
        raise ValueError(
            f"schedule.stages.{stage.name}.world_size ({wanted}) differs from the number of ranks "
            f"({world_size}), and this stage is next; start {wanted} ranks."
        )

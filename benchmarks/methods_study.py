"""The field's ways from an autoregressive model to a diffusion one, side by side on a tiny model.

    python -m benchmarks.methods_study [--methods wsd growth ...] [--seeds 3] [--tokens 100000]

Every method converts the same AR model (`benchmarks.guided_runs` has model, corpus and base), once with equal document
tokens and once with the document tokens that make its floating-point operations those of `wsd`, by the planner's
formulas. The ELBO at block 32 is measured the same way for all, whatever a method trains for. Seed by seed, all methods
run; tables and picture are written after each run and hold what has been measured. A run that is there is not repeated,
and one that was interrupted goes on. Runs of other lengths have a folder of their own, so that a short trial leaves
nothing in the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.guided_runs import LEARNING_RATE, ROWS, SIZES, TARGET, base_stages, run_config
from benchmarks.methods_table import write_methods
from benchmarks.record import RESULTS, machine
from benchmarks.study_corpus import CONTEXT_LENGTH, write_corpora
from benchmarks.study_cost import MANY, check_tokens, mean_operations, model_tokens
from benchmarks.study_jobs import (
    RESULT,
    Job,
    Lengths,
    base_job,
    held_out_nats,
    num_tokens,
    run,
    run_jobs,
    run_name,
    seconds_per_token,
)
from megatron_dllm.config import NoiseConfig, StageConfig, TrainConfig
from megatron_dllm.config.alignment import AlignmentConfig
from megatron_dllm.config.annealing import RANDOM, AttentionAnnealConfig
from megatron_dllm.config.distill import TEACHER, DistillConfig, TeacherConfig
from megatron_dllm.config.fitting import fitted
from megatron_dllm.config.rules import check_positive
from megatron_dllm.run.command import run_command

MODEL = SIZES["tiny"]
REFERENCE = "wsd"
TOKENS, OPERATIONS = EQUAL = ("tokens", "operations")

# Block size and share of the document tokens of each stage.
_WSD = ((1, 0.1), (4, 0.1), (32, 0.1), (64, 0.1), (CONTEXT_LENGTH, 0.3), (128, 0.1), (TARGET, 0.2))
_GROWTH = ((1, 0.2), (4, 0.2), (TARGET, 0.6))
_DOUBLING = (*((size, 0.1) for size in (1, 2, 4, 8, 16)), (TARGET, 0.5))
_JUMP, _FULL = ((TARGET, 1.0),), ((CONTEXT_LENGTH, 1.0),)
_CLEAN_AR = {"clean_block_size": 1, "ar_weight": 0.5}
_PAIR = dict(num_views=2, view_relation="complementary", loss_weight="uniform", t_min=0.001, t_max=0.999)


@dataclass(frozen=True)
class Method:
    """One way to convert.

    Attributes:
        blocks: block size and share of the document tokens of each stage.
        settings: of every stage.
        t_unit: what shares a noise level.
        lr_multipliers: of the optimizer.
        backend: of attention.
    """

    blocks: tuple[tuple[int, float], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    t_unit: str = "block"
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)
    backend: str = "auto"

    def stages(self, num_tokens: float, rows: int = ROWS) -> dict[str, StageConfig]:
        """Its stages, with so many document tokens and rows of a step; the learning rate rises first and falls last."""
        stages = {}
        for index, (block_size, share) in enumerate(self.blocks):
            is_last = index == len(self.blocks) - 1
            stages[f"{index}_{block_size}"] = StageConfig(
                block_size=block_size,
                num_tokens=round(share * num_tokens),
                global_batch_size=rows,
                micro_batch_size=rows,
                learning_rate=LEARNING_RATE,
                lr_warmup_share=0.05 / share if index == 0 else 0.0,
                lr_shape="cosine" if is_last else "constant",
                final_learning_rate=LEARNING_RATE / 10 if is_last else None,
                **self.settings,
            )
        return stages


METHODS = {
    REFERENCE: Method(_WSD),
    "growth": Method(_GROWTH),
    "jump": Method(_JUMP),
    "sdar": Method(_JUMP, t_unit="document"),
    "fast_dllm": Method(_JUMP, {**_PAIR, "shift": True}),
    "bd3lm": Method(((CONTEXT_LENGTH, 0.85), (TARGET, 0.15))),
    "llada": Method(_FULL, t_unit="document"),
    "diffullama": Method(_FULL, {"shift": True}, t_unit="document"),
    "diffullama, opening window": Method(
        _FULL, {"shift": True, "attention_anneal": AttentionAnnealConfig(steps=50)}, t_unit="document"
    ),
    "diffullama, opening at random": Method(
        _FULL,
        {"shift": True, "attention_anneal": AttentionAnnealConfig(steps=50, kind=RANDOM)},
        t_unit="document",
        backend="dense",
    ),
    "dream": Method(_FULL, {"shift": True, "loss_weight": "cart"}, t_unit="document"),
    "rnd1": Method(_FULL, {"shift": True}, lr_multipliers={"*.mlp.*": 0.1, "*.mlp.router.*": 0.0}),
    "wsd, shift": Method(_WSD, {"shift": True}),
    "growth, shift": Method(_GROWTH, {"shift": True}),
    "growth, shift, clean blocks of 1, AR loss": Method(_GROWTH, {**_CLEAN_AR, "shift": True}),
    "growth, bell": Method(_GROWTH, {"t_density": "bell"}),
    "growth, order 1": Method(_GROWTH, {"order_bias": 1.0}),
    "growth, rising t_max": Method(_GROWTH, {"t_max_start": 0.3, "t_max_ramp_share": 0.5}),
    "growth, aligned": Method(_GROWTH, {"alignment": AlignmentConfig(weight=1.0)}),
    "growth, aligned with the base": Method(_GROWTH, {"alignment": AlignmentConfig(weight=1.0, source=TEACHER)}),
    "growth, distilled from the base": Method(_GROWTH, {"distill": DistillConfig(weight=1.0, source=TEACHER)}),
    "growth, AR rows": Method(_GROWTH, {"ar_weight": 0.5, "ar_row_share": 0.2}),
    "growth, clean blocks of 1": Method(_GROWTH, {"clean_block_size": 1}),
    "growth, clean blocks of 1, AR loss": Method(_GROWTH, _CLEAN_AR),
    "growth, clean blocks of 1, AR loss, distilled": Method(
        _GROWTH, {**_CLEAN_AR, "distill": DistillConfig(weight=1.0)}
    ),
    "nbdiff": Method(_DOUBLING, {**_CLEAN_AR, "shift": True, "loss_weight": "uniform"}, t_unit="document"),
}


def method_run(folder: Path, name: str, method: Method, seed: int, num_tokens: float, rows: int = ROWS) -> TrainConfig:
    """The run of a method, not measured on its way; rows have room for two views where it has them.

    Args:
        folder: of the runs of these lengths, in which the AR model lies.
        name: of the run.
        method: how it converts.
        seed: of order and noise.
        num_tokens: document tokens.
        rows: of a step.
    """
    config = run_config(folder, name, MODEL, seed, method.stages(num_tokens, rows))
    num_views = max(stage.num_views for stage in config.schedule.stages.values())
    schedule = replace(config.schedule, row_length=(num_views + 1) * CONTEXT_LENGTH)
    return replace(
        config,
        schedule=fitted(schedule, MODEL.max_position_embeddings),
        data=replace(config.data, validation=None),
        evaluation=replace(config.evaluation, num_tokens=0, with_ar=False),
        noise=NoiseConfig(t_unit=method.t_unit),
        optimizer=replace(config.optimizer, lr_multipliers=dict(method.lr_multipliers)),
        training=replace(config.training, attention_backend=method.backend),
        teacher=TeacherConfig(str(folder / "base") if config.taught_stages else None),
    )


def equal_run(folder: Path, name: str, kind: str, seed: int, num_tokens: int, rows: int = ROWS) -> TrainConfig:
    """The run of the method of that name, with the tokens or the operations of `num_tokens` of the reference."""
    method, own = METHODS[name], run_name(name, kind, seed)
    tokens = float(num_tokens)
    if kind == OPERATIONS:
        reference, cost = (
            mean_operations(method_run(folder, own, one, seed, MANY, rows)) for one in (METHODS[REFERENCE], method)
        )
        tokens *= reference / cost
    return method_run(folder, own, method, seed, tokens, rows)


def jobs_of(study: Path, methods: Sequence[str], num_seeds: int, lengths: Lengths) -> Iterator[Job]:
    """The AR model, and the runs that convert it, in their order.

    Args:
        study: folder of the runs, with the corpora.
        methods: names of METHODS.
        num_seeds: seeds of each.
        lengths: of the runs.
    """
    folder = study / lengths.name
    yield base_job(run_config(folder, "base", MODEL, 0, base_stages(lengths.base_tokens, lengths.rows)), "AR model")
    for seed in range(1, num_seeds + 1):
        for kind in EQUAL:
            for name in methods:
                yield _job(equal_run(folder, name, kind, seed, lengths.tokens, lengths.rows), name, kind, seed)


def _job(config: TrainConfig, name: str, kind: str, seed: int) -> Job:
    about = {"method": name, "equal": kind, "seed": seed, "document_tokens": num_tokens(config)}
    target = Path(config.run.root) / config.run.name
    cost = num_tokens(config) * mean_operations(config)
    return Job(f"seed {seed}, {name}, equal {kind}", target / RESULT, cost, lambda: {**about, **convert(config)})


def convert(config: TrainConfig) -> Mapping[str, float]:
    """Run a method: the ELBO and the AR NLL at its end, in nats per token, and what a document token cost."""
    run(config)
    nats = held_out_nats(config, "evaluation.with_ar=true")
    return {
        "elbo": nats[str(TARGET)],
        "ar_nll": nats["ar"],
        "model_tokens": model_tokens(config),
        "seconds_per_token": seconds_per_token(config),
    }


def validate(methods: Sequence[str], num_seeds: int, lengths: Lengths) -> None:
    """Raise ValueError where a number is not positive or a stage would be shorter than a step."""
    check_positive("seeds", num_seeds)
    check_positive("rows", lengths.rows)
    nowhere = Path("runs")
    base = run_config(nowhere, "base", MODEL, 0, base_stages(MANY, lengths.rows))
    check_tokens("base_tokens", lengths.base_tokens, [base])
    runs = [equal_run(nowhere, name, kind, 1, MANY, lengths.rows) for kind in EQUAL for name in methods]
    check_tokens("tokens", lengths.tokens, runs)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, and write the tables after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("runs/methods_study"), help="folder of the runs")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="number of them")
    parser.add_argument("--tokens", type=int, default=100_000, help="document tokens of a conversion")
    parser.add_argument("--base_tokens", type=int, default=2_400_000, help="document tokens of the AR model")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a step")
    parser.add_argument("--output", type=Path, default=RESULTS / "methods_study", help="results, without suffix")
    options = parser.parse_args(arguments)
    lengths = Lengths(options.tokens, options.base_tokens, options.rows)
    validate(options.methods, options.seeds, lengths)
    write_corpora(options.study)
    about: dict[str, Any] = machine() | asdict(lengths)
    jobs = list(jobs_of(options.study, options.methods, options.seeds, lengths))
    results = options.study / lengths.name
    run_jobs(jobs, lambda: write_methods(results.glob(f"*/{RESULT}"), options.output, about, REFERENCE))
    return 0


if __name__ == "__main__":
    run_command(main)

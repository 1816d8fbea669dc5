"""The field's ways from an autoregressive model to a diffusion one, side by side on a tiny model.

    python -m benchmarks.methods_study [--methods wsd growth ...] [--seeds 3] [--tokens 400000]

Every method converts the same AR model (`benchmarks.guided_runs` has model, corpus and base), once with equal document
tokens and once with the document tokens that make its floating-point operations those of `wsd` (what an alignment adds
is not counted). The ELBO at block 32 is measured the same way for all, whatever a method trains for. A run that is
there is not repeated, and one that was interrupted goes on; the tables and the picture hold what has been measured.
Runs with other numbers of tokens have a folder of their own, so that a short trial leaves nothing in the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.ar_guided import RESULT, run, run_name
from benchmarks.guided_runs import (
    CONTEXT_LENGTH,
    LEARNING_RATE,
    SIZES,
    TARGET,
    base_stages,
    operations,
    run_config,
    write_corpora,
)
from benchmarks.methods_table import write_methods
from benchmarks.record import RESULTS, machine
from benchmarks.tiny_run import read_metrics
from megatron_dllm.config import NoiseConfig, StageConfig, TrainConfig
from megatron_dllm.config.alignment import AlignmentConfig
from megatron_dllm.config.annealing import AttentionAnnealConfig
from megatron_dllm.config.fitting import fitted
from megatron_dllm.run.command import run_command
from megatron_dllm.run.files import write_json

MODEL = SIZES["tiny"]
REFERENCE = "wsd"
TOKENS, OPERATIONS = EQUAL = ("tokens", "operations")

# Block size and share of the document tokens of each stage.
_WSD = ((1, 0.1), (4, 0.1), (32, 0.1), (64, 0.1), (CONTEXT_LENGTH, 0.3), (128, 0.1), (TARGET, 0.2))
_GROWTH = ((1, 0.2), (4, 0.2), (TARGET, 0.6))
_JUMP, _FULL = ((TARGET, 1.0),), ((CONTEXT_LENGTH, 1.0),)
_PAIR = dict(num_views=2, view_relation="complementary", loss_weight="uniform", t_min=0.001, t_max=0.999)


@dataclass(frozen=True)
class Method:
    """One way to convert.

    Attributes:
        blocks: block size and share of the document tokens of each stage.
        settings: of every stage.
        t_unit: what shares a noise level.
        lr_multipliers: of the optimizer.
    """

    blocks: tuple[tuple[int, float], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    t_unit: str = "block"
    lr_multipliers: Mapping[str, float] = field(default_factory=dict)

    def stages(self, num_tokens: float) -> dict[str, StageConfig]:
        """Its stages, with so many document tokens together; the learning rate rises first and falls last."""
        stages = {}
        for index, (block_size, share) in enumerate(self.blocks):
            is_last = index == len(self.blocks) - 1
            stages[f"{index}_{block_size}"] = StageConfig(
                block_size=block_size,
                num_tokens=round(share * num_tokens),
                global_batch_size=8,
                micro_batch_size=8,
                learning_rate=LEARNING_RATE,
                lr_warmup_share=0.05 / share if index == 0 else 0.0,
                lr_shape="cosine" if is_last else "constant",
                final_learning_rate=LEARNING_RATE / 10 if is_last else None,
                **self.settings,
            )
        return stages

    @property
    def cost(self) -> float:
        """Floating-point operations of a document token."""
        return sum(
            share * operations(MODEL, stage)
            for (_, share), stage in zip(self.blocks, self.stages(1e6).values(), strict=True)
        )


METHODS = {
    REFERENCE: Method(_WSD),
    "growth": Method(_GROWTH),
    "jump": Method(_JUMP),
    "sdar": Method(_JUMP, t_unit="document"),
    "fast_dllm": Method(_JUMP, {**_PAIR, "shift": True}),
    "bd3lm": Method(((CONTEXT_LENGTH, 0.85), (TARGET, 0.15))),
    "llada": Method(_FULL, t_unit="document"),
    "diffullama": Method(_FULL, {"shift": True}, t_unit="document"),
    "diffullama, opening mask": Method(
        _FULL, {"shift": True, "attention_anneal": AttentionAnnealConfig(steps=50)}, t_unit="document"
    ),
    "dream": Method(_FULL, {"shift": True, "loss_weight": "cart"}, t_unit="document"),
    "rnd1": Method(_FULL, {"shift": True}, lr_multipliers={"*.mlp.*": 0.1, "*.mlp.router.*": 0.0}),
    "growth, bell": Method(_GROWTH, {"t_density": "bell"}),
    "growth, order 1": Method(_GROWTH, {"order_bias": 1.0}),
    "growth, rising t_max": Method(_GROWTH, {"t_max_start": 0.3, "t_max_ramp_share": 0.5}),
    "growth, aligned": Method(_GROWTH, {"alignment": AlignmentConfig(weight=1.0)}),
    "growth, clean blocks of 1, AR loss": Method(_GROWTH, {"clean_block_size": 1, "ar_weight": 0.5}),
}


def method_config(folder: Path, name: str, method: Method, seed: int, num_tokens: float) -> TrainConfig:
    """The run of a method; rows have room for two views where it has them."""
    config = run_config(folder, name, MODEL, seed, method.stages(num_tokens))
    num_views = max(stage.num_views for stage in config.schedule.stages.values())
    schedule = replace(config.schedule, row_length=(num_views + 1) * CONTEXT_LENGTH)
    return replace(
        config,
        schedule=fitted(schedule, MODEL.max_position_embeddings),
        noise=NoiseConfig(t_unit=method.t_unit),
        optimizer=replace(config.optimizer, lr_multipliers=dict(method.lr_multipliers)),
    )


def equal_tokens(method: Method, kind: str, num_tokens: float) -> float:
    """Document tokens of a method, for `num_tokens` of the reference."""
    return num_tokens if kind == TOKENS else num_tokens * METHODS[REFERENCE].cost / method.cost


def measure(folder: Path, name: str, kind: str, seed: int, num_tokens: float) -> None:
    """Convert by one method with one seed, and write down what came of it."""
    method = METHODS[name]
    tokens = equal_tokens(method, kind, num_tokens)
    config = method_config(folder, run_name(name, kind, seed), method, seed, tokens)
    target = Path(config.run.root) / config.run.name
    if (target / RESULT).is_file():
        return
    seconds = run(config)
    end = [record for record in read_metrics(config) if record.get("validation")][-1]
    write_json(
        target / RESULT,
        {
            "method": name,
            "equal": kind,
            "seed": seed,
            "document_tokens": round(tokens),
            "operations": tokens * method.cost,
            "elbo": end[f"validation_elbo/{TARGET}"],
            "seconds": seconds,
        },
    )


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, and write the tables after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("runs/methods_study"), help="folder of the runs")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="number of them")
    parser.add_argument("--tokens", type=int, default=400_000, help="document tokens of a conversion")
    parser.add_argument("--base_tokens", type=int, default=2_000_000, help="document tokens of the AR model")
    parser.add_argument("--output", type=Path, default=RESULTS / "methods_study", help="results, without suffix")
    options = parser.parse_args(arguments)
    # Runs of other lengths lie elsewhere: they are neither gone on with nor put into this table.
    folder = options.study / f"{options.base_tokens}_{options.tokens}"
    write_corpora(options.study)
    run(run_config(folder, "base", MODEL, 0, base_stages(options.base_tokens)))
    about: dict[str, Any] = machine() | {"tokens": options.tokens, "base_tokens": options.base_tokens}
    for seed in range(1, options.seeds + 1):
        for kind in EQUAL:
            for name in options.methods:
                measure(folder, name, kind, seed, options.tokens)
                write_methods(folder.glob(f"*/{RESULT}"), options.output, about, REFERENCE)
    return 0


if __name__ == "__main__":
    run_command(main)

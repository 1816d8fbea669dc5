"""What computing one part of a layer of experts again would save, by the planner's closed form.

    python -m benchmarks.finer_recomputation

megatron-core can compute again more parts than `parallel.recompute` offers; docs/planning.md says why it does not.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, machine, table, write_results
from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.planning.layers import Tokens, layer_cost
from megatron_dllm.run.command import run_command

MODELS = ("ling_mini", "qwen3_30b_a3b", "ling_flash")
NOTE = "kB of a token that are not kept for the backward pass; bf16, without tensor ranks; `kept`: of the whole layer."
# Bytes of a number in bf16.
_WIDTH = 2


def saved(model: ModelConfig) -> dict[str, float]:
    """Bytes of a token and layer of experts that each part keeps, and those of the layer, by name."""
    cost = layer_cost(model, ParallelConfig(precision="bf16"), Tokens(1.0, 1.0, 0.0), True, 1.0)
    return {
        "attention (selective)": cost.recomputed,
        "the two norms": 2.0 * _WIDTH * model.hidden_size,
        "the experts' activation": float(_WIDTH * model.moe_router_topk * model.moe_ffn_hidden_size),
        # Its input is that of the experts; gate, value and their product are its own.
        "the shared expert": 3.0 * _WIDTH * model.moe_shared_expert_intermediate_size,
        "the whole expert layer": cost.kept_by_mlp,
        "the layer (full)": cost.kept - _WIDTH * model.hidden_size,
        "kept": cost.kept,
    }


def rows_of(models: dict[str, ModelConfig]) -> list[dict[str, Any]]:
    """A row a part, a column a model."""
    found = {name: saved(model) for name, model in models.items()}
    return [
        {"computed again": part} | {name: f"{one[part] / 1e3:.1f}" for name, one in found.items()}
        for part in next(iter(found.values()))
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "finer_recomputation", help="without suffix")
    args = parser.parse_args(arguments)
    words = ["run.name=x", "data.train=x"]
    rows = rows_of({name: compose_train_config([f"model={name}", *words]).model for name in MODELS})
    write_results(args.output, "Finer recomputation", machine(), {"parts": rows}, NOTE)
    print(table(rows))
    return 0


if __name__ == "__main__":
    run_command(main)

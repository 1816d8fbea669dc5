"""Average the best checkpoints of a run: `python -m checkpoints_tools.merge_topk`.

The mean of the k checkpoints with the lowest validation ELBO (LLaDA2.0 section 4.4), of an explicit list,
or of the last n; of torch_dist checkpoints or of Hugging Face folders. Weights only: no optimizer state.
Streams: memory holds a piece of each input, whatever the model's size.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints_tools.command import prepare_tool, whole_number
from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.merging.averaging import WEIGHTS, merge_weights
from megatron_dllm.checkpoint.merging.inputs import MergeInput, check_alike, open_input, tell_differences
from megatron_dllm.checkpoint.merging.stream import merge_into
from megatron_dllm.checkpoint.meta import read_meta
from megatron_dllm.checkpoint.ranking import METRICS, rank
from megatron_dllm.checkpoint.validation import read_validation, validation_elbo
from megatron_dllm.run.code_version import commit
from megatron_dllm.run.names import CHECKPOINTS

logger = logging.getLogger(__name__)
FORMATS = ("auto", "torch_dist", "hf")


def choose(
    run: Path, k: int, metric: str = "elbo", last_n: int | None = None, block_size: int | None = None
) -> tuple[list[Path], dict[str, Any]]:
    """The k best checkpoints of a run, oldest first.

    Candidates share the contract (objective, block size) of the run's last checkpoint. Those whose metric is not a
    finite number, or was measured under other conditions than the last one's (text, tokens, noise), stay out.

    Args:
        run: run folder.
        k: how many.
        metric: one of METRICS; lower is better.
        last_n: only among the last n candidates.
        block_size: at which the metric was measured; None: the target block size of the last evaluation.

    Returns:
        The folders, and what provenance.json says about the choice.

    Raises:
        ValueError: too few evaluated checkpoints.
    """
    complete = folders.list_checkpoints(run / CHECKPOINTS) or folders.list_checkpoints(run)
    if not complete:
        raise ValueError(f"run ({run}) holds no complete checkpoint; name a run folder.")
    semantics = {folder: read_meta(folder).semantics for folder in complete}
    alike = [folder for folder in complete if semantics[folder] == semantics[complete[-1]]]
    if len(alike) < len(complete):
        logger.info(
            "%d of %d checkpoints were trained with another objective or block size and stay out",
            len(complete) - len(alike),
            len(complete),
        )
    candidates = alike[-last_n:] if last_n else alike
    validations = {folder: found for folder in candidates if (found := read_validation(folder)) is not None}
    ranking = rank(validations, metric, block_size)
    for folder, reason in ranking.left_out.items():
        logger.warning("%s stays out: %s", folder.name, reason)
    conditions = ranking.reference.conditions if ranking.reference else None
    choice = {
        "run": str(run.absolute()),
        "metric": metric,
        "block_size": ranking.block_size,
        "conditions": asdict(conditions) if conditions else None,
        "last_n": last_n,
        "ranking": [{"checkpoint": folder.name, metric: score} for score, folder in ranking.scores],
    }
    if last_n and k >= len(candidates) == last_n:
        logger.info("all of the last %d checkpoints", last_n)
        return candidates, choice
    for number, (score, folder) in enumerate(ranking.scores):
        logger.info("%s %2d. %s  %s %.5f", "*" if number < k else " ", number + 1, folder.name, metric, score)
    if len(ranking.scores) < k:
        example = next((f"; {folder.name} stays out: {why}" for folder, why in ranking.left_out.items()), "")
        raise ValueError(
            f"k ({k}) must not exceed the checkpoints of {run} with {metric} in validation.json "
            f"({len(ranking.scores)} of {len(candidates)}){example}; lower k, evaluate more checkpoints alike, or "
            "list them with --checkpoints."
        )
    return sorted(folder for _, folder in ranking.scores[:k]), choice


def merge(
    checkpoints: list[Path],
    output: Path,
    weights: str = "uniform",
    input_format: str = "auto",
    choice: dict[str, Any] | None = None,
) -> None:
    """Average checkpoints.

    Args:
        checkpoints: folders, oldest first.
        output: folder to make; must not exist.
        weights: one of WEIGHTS.
        input_format: one of FORMATS; auto: torch_dist where there is a contract.json.
        choice: how they were chosen, for provenance.json.

    Raises:
        ValueError: the inputs are not the same model; nothing is left behind.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"checkpoints ({len(checkpoints)}) must be at least 2 to have a mean; name more.")
    inputs: list[MergeInput] = [open_input(folder, input_format) for folder in checkpoints]
    try:
        check_alike(inputs)
        tell_differences(inputs)
        values = merge_weights(weights, len(inputs))
        provenance = {
            "tool": "merge_topk",
            "commit": commit(),
            "weights": weights,
            "inputs": [
                {
                    "checkpoint": str(item.folder.absolute()),
                    "weight": value,
                    "step": item.step,
                    "elbo": validation_elbo(item.folder),
                }
                for item, value in zip(inputs, values, strict=True)
            ],
            "choice": choice,
        }
        merge_into(inputs, values, output, provenance)
    finally:
        for item in inputs:
            item.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run folder: its best checkpoints")
    source.add_argument("--checkpoints", type=Path, nargs="+", help="these folders, oldest first")
    parser.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--k", type=whole_number(1), help="how many of a run (default 5, or last_n)")
    parser.add_argument("--metric", choices=METRICS, default="elbo", help="of validation.json; lower is better")
    parser.add_argument(
        "--block_size", type=whole_number(1), help="at which the metric was measured (default: the target)"
    )
    parser.add_argument(
        "--last_n", type=whole_number(1), help="only the last n checkpoints; alone: all of them, evaluated or not"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="uniform", help="uniform, or imitating a decay (WSM)")
    parser.add_argument("--input_format", choices=FORMATS, default="auto")
    arguments = parser.parse_args()
    prepare_tool()
    checkpoints, choice = arguments.checkpoints, None
    if checkpoints is None:
        k = arguments.k or arguments.last_n or 5
        checkpoints, choice = choose(arguments.run, k, arguments.metric, arguments.last_n, arguments.block_size)
    merge(checkpoints, arguments.output, arguments.weights, arguments.input_format, choice)


if __name__ == "__main__":
    run_command(main)

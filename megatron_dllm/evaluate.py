"""Measure the validation ELBO of a checkpoint: a merged one, say, or an old one at other block sizes.

    python -m megatron_dllm.evaluate experiment=NAME checkpoint.load=DIR [evaluation.block_sizes=[32,4]] ...

The experiment names model, corpus and rows; it runs on one process or under torchrun. The result is printed and
written beside the checkpoint as validation.json.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
from rich.console import Console
from rich.table import Table

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.identity import check_grid
from megatron_dllm.checkpoint.validation import Validation, write_validation
from megatron_dllm.compose import prepare_command_line, register_schemas, to_train_config
from megatron_dllm.config import TrainConfig
from megatron_dllm.config.recipe_source import RECIPES
from megatron_dllm.run.place import is_rank_zero, world_size

log = logging.getLogger(__name__)


def evaluate_checkpoint(config: TrainConfig) -> Validation:
    """Load `checkpoint.load`, measure it, and write validation.json beside it.

    Raises:
        ValueError: nothing to load, no validation rows, or a checkpoint of another model.
    """
    config.validate(world_size())
    if not config.checkpoint.load or not config.evaluation.num_tokens or config.data.validation is None:
        raise ValueError(
            f"checkpoint.load ({config.checkpoint.load}), evaluation.num_tokens "
            f"({config.evaluation.num_tokens}) and data.validation ({config.data.validation}) must be "
            "set: name the checkpoint, how many tokens to measure, and the held-out corpus."
        )
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()

    from megatron_dllm.checkpoint.identity import check_identity
    from megatron_dllm.checkpoint.loading import load_weights
    from megatron_dllm.data.corpus import Corpus
    from megatron_dllm.evaluation.elbo import evaluate
    from megatron_dllm.model.objective import AR
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.device import DeviceFacts, local_device
    from megatron_dllm.parallel.groups import destroy, initialize
    from megatron_dllm.training.engine import build_chunks

    folder = folders.resolve_checkpoint(Path(config.checkpoint.load))
    stored = check_identity(folder, config.model)
    check_grid(folder, stored, config.data.block_origin)
    corpus = Corpus(config.data.validation, config.model, config.data.tokenizer)
    # Refuses what cannot run here.
    choose_paths(config.model, config.parallel, DeviceFacts.here(), config.training.attention_backend)
    groups = initialize(config.parallel, config.run)
    try:
        chunks = build_chunks(config, groups)
        load_weights(folder, chunks, config.checkpoint.verify)
        device = local_device()
        names = [AR] if not stored.is_diffusion else [str(size) for size in config.evaluation.block_sizes]
        result = evaluate(chunks, config, groups, corpus, names, device)
        if is_rank_zero():
            write_validation(folder, result)
    finally:
        destroy()
    return result


@hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="train")
def _main(config: Any) -> None:
    try:
        result = evaluate_checkpoint(to_train_config(config))
    except ValueError as error:
        log.error("%s", error)
        sys.exit(2)
    if is_rank_zero():
        table = Table("block size", "nats/token", "bits/byte")
        for name, value in result.nats_per_token.items():
            bits = result.bits_per_byte.get(name)
            table.add_row(name, f"{value:.4f}", "-" if bits is None else f"{bits:.4f}")
        Console().print(table)


if __name__ == "__main__":
    register_schemas()
    sys.argv[1:] = prepare_command_line(sys.argv[1:])
    _main()

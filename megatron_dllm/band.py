"""Compare bands of noise levels: in which of them does the loss of a block vary least?

    python -m megatron_dllm.band checkpoint=DIR data.validation=PREFIX block_sizes=[4,32] [draws=4] [key=value ...]
    torchrun --nproc_per_node N -m megatron_dllm.band ... [parallel.tensor_model_parallel_size=2]

For every block size a table of bands, the one with the least relative variance first. Nothing is switched by itself: a
band goes into t_min and t_max of a stage, whose loss is then the mean over these levels alone and no bound on the NLL.
A band near 1 varies little by construction, as every token is masked. `draws` is the number of passes over the
documents; output=FILE keeps the tables as JSON; other keys are those of `evaluate`.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_dllm.compose import compose_dict
from megatron_dllm.config import RunConfig
from megatron_dllm.config.band import BandConfig
from megatron_dllm.config.evaluate import spelled_out
from megatron_dllm.config.recipe_source import split_folder
from megatron_dllm.config.rules import check, check_positive
from megatron_dllm.evaluation.band import WHOLE, Band, candidates, measure_bands
from megatron_dllm.evaluation.request import Request, open_config, read_request
from megatron_dllm.run.files import parents_made, write_json
from megatron_dllm.run.place import is_rank_zero, world_size
from megatron_dllm.run.stream import check_new, check_writable

# Bands of a table; the whole range is always one of them.
_LINES = 6


def compose_words(words: Sequence[str]) -> Any:
    """Compose recipes/evaluate.yaml with the words of a command line.

    Raises:
        ValueError: an unknown key, or a value of a wrong type.
    """
    folder, rest = split_folder(spelled_out(words))
    ConfigStore.instance().store(name="evaluate_schema", node=open_config(BandConfig))
    return compose_dict(rest, "evaluate", folder, BandConfig)


def read_band_request(composed: Any, num_ranks: int) -> Request:
    """What is measured, checked.

    Raises:
        ValueError: what `read_request` refuses, weights without noise levels, or a file that exists.
    """
    check_positive("draws", composed.draws)
    request = read_request(composed, num_ranks)
    check(
        request.weights.is_diffusion,
        f"checkpoint.load ({request.weights.folder}) is autoregressive and knows no noise levels; name a checkpoint of "
        "a block-diffusion stage.",
    )
    check(
        not request.config.evaluation.with_ar,
        "evaluation.with_ar (true) asks for an exact NLL, which has no noise levels; set it to false.",
    )
    if request.config.output:
        (check_writable if request.config.overwrite else check_new)(Path(request.config.output))
    return request


def measure(composed: Any) -> tuple[Request, dict[str, list[Band]]]:
    """Load the checkpoint and compare the bands of every block size (a collective).

    Args:
        composed: from `compose_words`.

    Raises:
        ValueError: what `read_band_request` refuses, or too few documents.
    """
    from megatron_dllm.host import prepare_host, quiet_libraries

    quiet_libraries()
    prepare_host()
    from megatron_dllm.data.corpus import Corpus
    from megatron_dllm.evaluation.block_losses import corpus_block_losses
    from megatron_dllm.evaluation.elbo import check_corpus
    from megatron_dllm.parallel.meeting import meet
    from megatron_dllm.training.measuring import measured_model

    def open_corpus(config: Any) -> Corpus:
        return Corpus(config.data.validation, config.model, config.data.tokenizer)

    def decide() -> Request:
        request = read_band_request(composed, world_size())
        corpus = open_corpus(request.config)
        corpus.verify()
        check_corpus(request.config, corpus, request.names, request.weights.sft)
        return request

    timeout = composed.run.distributed_timeout_minutes
    meeting = meet(RunConfig(name="band", distributed_timeout_minutes=timeout))
    request = meeting.decide(decide)
    tables = {}
    with measured_model(request, meeting) as model:
        corpus = open_corpus(request.config)
        for name in request.names:
            drawn = [
                corpus_block_losses(
                    model, corpus, int(name), seed, request.weights.sft, f"block {name}, draw {seed + 1}"
                )
                for seed in range(composed.draws)
            ]
            levels, losses = (np.concatenate(column) for column in zip(*drawn, strict=True))
            tables[name] = measure_bands(levels, losses, candidates())
    return request, tables


def table_of(name: str, bands: Sequence[Band]) -> Table:
    """The first bands of a block size, and the whole range."""
    table = Table("t_min", "t_max", "blocks", "variance / mean^2", "mean loss, nats", title=f"block size {name}")
    shown = [*bands[:_LINES], *[band for band in bands[_LINES:] if (band.t_min, band.t_max) == WHOLE]]
    for band in shown:
        cells = f"{band.relative_variance:.4f}", f"{band.mean:.4f}"
        table.add_row(f"{band.t_min:g}", f"{band.t_max:g}", f"{band.num_blocks:,}", *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(highlight=False, soft_wrap=True)
    if "-h" in words or "--help" in words:
        console.print(Text(str(__doc__)))
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    request, tables = measure(compose_words(words))
    if not is_rank_zero():
        return 0
    for name, bands in tables.items():
        console.print(table_of(name, bands))
    console.print(Text("Nothing was changed: a band goes into t_min and t_max of a stage."))
    if request.config.output:
        output = Path(request.config.output)
        with parents_made(output):
            write_json(output, {name: [asdict(band) for band in bands] for name, bands in tables.items()})
        console.print(Text(f"written to {output}"))
    return 0


if __name__ == "__main__":
    run_command(main)

"""Tokens per second of decoding a model of real proportions, several texts in the same passes.

The weights are random, so a model is never sure of a token: a pass keeps as many of the block's tokens as it is told
to, which stands for one that is. Speed is that of the passes; loading is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import yaml

from benchmarks.attention import synchronize
from benchmarks.experts import facts_of
from benchmarks.gpu.checks import Check, Found, run_checks
from benchmarks.gpu.settings import Settings
from megatron_dllm.config import DecodingConfig, ModelConfig, ParallelConfig
from megatron_dllm.config.recipe_source import RECIPES
from megatron_dllm.diffusion.decode import DecodingContract, requests_of

BATCHES = (16, 1, 64)
SMALL_BATCHES = (1, 3)
# Tokens that a pass keeps of a block of 32: every one by itself, and a fifth or so, as the demo's model does.
KEPT = (6, 1)


@dataclass(frozen=True)
class Sizes:
    """What is decoded.

    Attributes:
        recipe: of the model.
        num_layers: of its layers.
        prompt: tokens of each prompt.
        new: tokens of each text.
    """

    recipe: str
    num_layers: int
    prompt: int
    new: int


REAL = Sizes(recipe="ling_mini", num_layers=4, prompt=256, new=128)
SMALL = Sizes(recipe="tiny_moe", num_layers=2, prompt=40, new=32)
BLOCK_SIZE = 32


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """One row for each number of texts and of tokens that a pass keeps; the value is tokens per second."""
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.parallel.groups import single_rank

    sizes = SMALL if settings.is_small else REAL
    with single_rank(0):
        built: list[Any] = []
        checks: dict[str, Check] = {"build": partial(_build, settings, sizes, built)}
        for kept in KEPT:
            for batch in SMALL_BATCHES if settings.is_small else BATCHES:
                name = f"{batch} texts, {kept} tokens a pass"
                checks[name] = partial(_measure, settings, sizes, built, batch, kept)
        yield from run_checks(settings, checks)


def model_of(sizes: Sizes) -> ModelConfig:
    """The recipe's model with fewer layers."""
    values = yaml.safe_load((RECIPES / "model" / f"{sizes.recipe}.yaml").read_text(encoding="utf-8"))
    return replace(ModelConfig(**values), num_layers=sizes.num_layers)


def _build(settings: Settings, sizes: Sizes, built: list[Any]) -> Found:
    """Build the model with random weights into `built`; the value is its parameters in millions."""
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.groups import Groups

    model = model_of(sizes)
    layout = ParallelConfig(precision="bf16" if settings.device == "cuda" else "fp32")
    paths = choose_paths(model, layout, facts_of(settings.device))
    torch.manual_seed(0)
    built.append(build_model(model, layout, Groups.current(), paths=paths).to(settings.device).eval())
    count = sum(parameter.numel() for parameter in built[0].parameters())
    return Found(count / 1e6, None, f"{sizes.recipe}, {sizes.num_layers} layers, {layout.precision}; {paths}")


def _measure(settings: Settings, sizes: Sizes, built: list[Any], batch: int, kept: int) -> Found:
    """Decode `batch` texts twice; the second time counts."""
    from megatron_dllm.inference.decoder import Decoder
    from megatron_dllm.parallel.groups import Groups

    model = built[0]
    ids = torch.randint(10, model.model_config.vocab_size // 2, (batch, sizes.prompt), generator=_generator())
    config = DecodingConfig(threshold=1.0, min_tokens_per_step=kept, max_new_tokens=sizes.new)
    contract = DecodingContract(BLOCK_SIZE, 4096, model.model_config.mask_token_id, ())
    decoder = Decoder(model, Groups.current(), contract, batch)
    seconds, device = 0.0, torch.device(settings.device)
    for tokens in (BLOCK_SIZE, sizes.new):
        synchronize(device)
        started = time.perf_counter()
        asked = replace(config, max_new_tokens=tokens)
        texts = decoder.decode(requests_of(ids.tolist(), asked), asked)
        synchronize(device)
        seconds = time.perf_counter() - started
    passes = max(text.num_denoising_forwards + text.num_commit_forwards for text in texts)
    num_tokens = sum(len(text.generated_ids) for text in texts)
    columns = {
        "texts": batch,
        "tokens_a_pass": kept,
        "milliseconds_a_pass": 1e3 * seconds / passes,
        "passes": passes,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if settings.device == "cuda" else None,
    }
    return Found(num_tokens / seconds, None, f"{num_tokens} tokens in {seconds:.2f} s", columns)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)

"""Decode prompts with a block-diffusion checkpoint.

    python -m megatron_dllm.generate checkpoint=DIR prompt="Once upon a time" [key=value ...]
    python -m megatron_dllm.generate checkpoint=DIR prompts_file=prompts.jsonl output=texts.jsonl

DIR is an HF folder, a run folder or one torch_dist checkpoint. Keys and defaults: `config.GenerateConfig`;
`--help` lists them. The text goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from megatron_dllm.compose import compose_dict
from megatron_dllm.config import GenerateConfig
from megatron_dllm.diffusion.decode import Generation, decode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptResult:
    """One prompt and what came of it.

    Attributes:
        generation: tokens and numbers of forward passes, see `diffusion.decode`.
        seconds: wall time of decoding, loading not included.
    """

    prompt: str
    text: str
    generation: Generation
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        generation = self.generation
        return {"prompt": self.prompt, "text": self.text, **asdict(generation),
                "num_generated_tokens": len(generation.generated_ids),
                "num_denoising_forwards": generation.num_denoising_forwards,
                "tokens_per_forward": generation.tokens_per_forward, "seconds": self.seconds}


def generate(config: GenerateConfig) -> list[PromptResult]:
    """Load a checkpoint and decode all prompts, in order, one at a time.

    The prompt with index i is sampled with seed + i, so a text does not depend on the prompts before it.

    Raises:
        ValueError: an impossible setting, checkpoint or prompt; before the weights are read wherever possible.
    """
    config.validate()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(f"WORLD_SIZE ({os.environ['WORLD_SIZE']}) must be 1: decoding runs on one rank; "
                         "start it with python -m, not torchrun.")
    if config.temperature == 0.0 and (config.top_p < 1.0 or config.top_k > 0):
        log.warning("top_p and top_k have no effect at temperature 0; set a temperature to sample.")
    prompts = read_prompts(config)
    if config.output is not None and Path(config.output).exists():
        raise ValueError(f"output ({config.output}) exists; nothing is overwritten: name a new file.")
    # Imports megatron-core, seconds that a wrong key or an empty file should not cost.
    from megatron_dllm.decoder import load_decoder, read_source, single_rank

    source = read_source(config)
    with single_rank(config.seed):
        decoder = load_decoder(config, source)
        encoded = [decoder.encode(prompt) for prompt in prompts]
        results = []
        for index, (prompt, ids) in enumerate(track(list(zip(prompts, encoded, strict=True)), "decoding",
                                                    console=Console(stderr=True), transient=True)):
            start = time.perf_counter()
            generation = decode(decoder.forward(), ids, replace(config, seed=config.seed + index), decoder.contract,
                                decoder.device)
            results.append(PromptResult(prompt, decoder.decode(generation.generated_ids), generation,
                                        time.perf_counter() - start))
    if config.output is not None:
        write_results(Path(config.output), results)
    return results


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts that the configuration names.

    Raises:
        ValueError: the file is missing, holds no prompt, or a line that is none; with its number.
    """
    if config.prompt is not None:
        return [config.prompt]
    assert config.prompts_file is not None, "validate() asks for one of prompt and prompts_file"
    path = Path(config.prompts_file)
    if not path.is_file():
        raise ValueError(f"prompts_file ({path}) is not a file; name a text file, or .jsonl with a \"prompt\" a line.")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            prompts.append(_json_prompt(line, f"{path}:{number}") if path.suffix == ".jsonl" else line)
    if not prompts:
        raise ValueError(f"prompts_file ({path}) holds no prompt; write one a line.")
    return prompts


def _json_prompt(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON ({error}); write an object with \"prompt\" a line.") from None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{place} ({line[:80]}) must be an object with a non-empty text \"prompt\".")
    return prompt


def write_results(path: Path, results: Sequence[PromptResult]) -> None:
    """Write one JSON object a line, to a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        for result in results:
            stream.write(json.dumps(result.to_dict(), ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    log.info("wrote %d texts to %s", len(results), path)


def show_results(results: Sequence[PromptResult]) -> None:
    """Print texts to standard output, and a table of forward passes to standard error."""
    out = Console(highlight=False, soft_wrap=True)
    for result in results:
        out.print(Text(result.prompt, style="dim") + Text(result.text))
    table = Table("prompt", "tokens", "stop", "denoising forwards", "commits", "TPF", "tokens/s")
    for result in results:
        generation = result.generation
        num_tokens = len(generation.generated_ids)
        table.add_row(Text(result.prompt[:32]), str(num_tokens), generation.stop_reason,
                      str(generation.num_denoising_forwards), str(generation.num_commit_forwards),
                      f"{generation.tokens_per_forward:.2f}", f"{num_tokens / result.seconds:.1f}")
    total_tokens = sum(len(result.generation.generated_ids) for result in results)
    total_forwards = sum(result.generation.num_denoising_forwards for result in results)
    console = Console(stderr=True)
    console.print(table)
    console.print(f"TPF (generated tokens / denoising forwards, commits not counted): {total_tokens} / {total_forwards} "
                  f"= {total_tokens / total_forwards:.2f}")


def parse_arguments(arguments: Sequence[str]) -> GenerateConfig:
    """Compose recipes/generate.yaml with `key=value` arguments.

    A prompt is taken as it is typed: Hydra's grammar would read commas, brackets and equal signs in it.

    Raises:
        ValueError: an unknown key, a value of a wrong type, or a missing required one.
    """
    prompts = [argument.removeprefix("prompt=") for argument in arguments if argument.startswith("prompt=")]
    if len(prompts) > 1:
        raise ValueError(f"prompt ({len(prompts)} times) may be given once; use prompts_file for several.")
    others = [argument for argument in arguments if not argument.startswith("prompt=")]
    ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)
    composed = compose_dict(others, config_name="generate", schema=GenerateConfig)
    try:
        config = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is required and has no value; set it on the command line.") from error
    assert isinstance(config, GenerateConfig), "recipes/generate.yaml starts from generate_schema"
    return replace(config, prompt=prompts[0]) if prompts else config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "-h" in arguments or "--help" in arguments:
        defaults = "\n".join(f"    {f.name}={f.default}" for f in fields(GenerateConfig))
        Console(highlight=False).print(Text(f"{__doc__}\n{defaults}"))
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_dllm").setLevel(logging.INFO)
    try:
        results = generate(parse_arguments(arguments))
    except ValueError as error:
        Console(stderr=True, soft_wrap=True).print(Text(f"error: {error}", style="red"))
        return 2
    show_results(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

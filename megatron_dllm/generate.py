"""Decode prompts with a block-diffusion checkpoint.

    python -m megatron_dllm.generate checkpoint=DIR prompt="Once upon a time" [key=value ...]
    python -m megatron_dllm.generate checkpoint=DIR prompts_file=prompts.jsonl output=texts.jsonl
    python -m megatron_dllm.generate checkpoint=DIR messages='[{"role": "user", "content": "Hi"}]'
    python -m megatron_dllm.generate checkpoint=DIR chats_file=chats.jsonl output=answers.jsonl
    torchrun --nproc_per_node N -m megatron_dllm.generate ... [tensor_model_parallel_size=2]

DIR is an HF folder, a run folder or one torch_dist checkpoint. Keys and defaults: `config.GenerateConfig`;
`--help` lists them. The text goes to standard output, everything else to standard error.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from megatron_dllm.compose import compose_dict
from megatron_dllm.config import GenerateConfig, ParallelConfig, RotaryScalingConfig, RunConfig
from megatron_dllm.config.command_line import taken_as_typed
from megatron_dllm.config.recipe_source import split_folder
from megatron_dllm.config.reference import keys_of
from megatron_dllm.data.tokenizer import load_tokenizer
from megatron_dllm.diffusion.decode import DecodingContract, Finished, requests_of
from megatron_dllm.diffusion.generation import Generation
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles
from megatron_dllm.inference.prompts import Prompt, encode_requests, parse_line, read_requests
from megatron_dllm.inference.source import CheckpointSource, read_source
from megatron_dllm.inference.stopping import StopStrings
from megatron_dllm.run.place import is_rank_zero, world_size
from megatron_dllm.run.stream import PARTIAL, check_new, partial_lines, result_lines

log = logging.getLogger(__name__)
_AS_TYPED = ("checkpoint", "prompt", "prompts_file", "messages", "chats_file", "output", "tokenizer")


@dataclass(frozen=True)
class PromptResult:
    """One prompt and what came of it.

    Attributes:
        prompt: as text; a chat's is what its template makes of it.
        generation: tokens and numbers of forward passes, see `diffusion.decode`.
        token_texts: text of each generated token, special ones included.
        seconds: wall time in which it was decoded, together with others.
    """

    prompt: str
    text: str
    generation: Generation
    token_texts: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        generation = self.generation
        return {
            "prompt": self.prompt,
            "text": self.text,
            **asdict(generation),
            "token_texts": self.token_texts,
            "num_generated_tokens": len(generation.generated_ids),
            "num_denoising_forwards": generation.num_denoising_forwards,
            "tokens_per_forward": generation.tokens_per_forward,
            "tokens_per_forward_with_commits": generation.tokens_per_forward_with_commits,
            "seconds": self.seconds,
        }


def generate(config: GenerateConfig, tell: Callable[[PromptResult], None] | None = None) -> list[PromptResult]:
    """Load a checkpoint and decode all prompts, many at a time (a collective); results are in order.

    The prompt with index i is sampled with seed + i, so a text does not depend on the prompts beside it. With `resume`,
    prompts that an earlier start has decoded are left out.

    Args:
        config: what to decode, and how.
        tell: called on rank 0 with each result, in order, as soon as those before it are known.

    Raises:
        ValueError: an impossible setting, checkpoint or prompt; before the weights are read wherever possible.
    """
    config.validate()
    # megatron-core takes seconds to import, which a wrong key or an empty file should not cost.
    from megatron_dllm.parallel.meeting import meet

    run = RunConfig(name="decoding", seed=config.seed)
    meeting = meet(run)
    plan = meeting.decide(lambda: _plan(config))
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.inference.decoder import Decoder
    from megatron_dllm.inference.load import load_model
    from megatron_dllm.parallel.groups import started

    source, stopping = plan.source, StopStrings(load_tokenizer(TokenizerFiles(plan.source.tokenizer)), (*config.stop,))
    requests = [
        replace(request, stop=stopping.find)
        for request in requests_of([prompt.ids for prompt in plan.prompts], config, plan.num_done)
    ]
    results: list[PromptResult] = []
    is_first = meeting.rank == 0
    with _written(config if is_first else None) as write, started(plan.layout, run, meeting) as groups:
        model = load_model(source, groups, config.precision, config.attention_backend, plan.layout)
        decoder = Decoder(model, groups, plan.contract, config.batch_size)
        # On a terminal the texts themselves show how far it is.
        bar, is_hidden = Console(stderr=True), not is_first or (tell is not None and sys.stdout.isatty())
        stream = decoder.stream(requests, config)
        watched = track(stream, "decoding", len(requests), console=bar, transient=True, disable=is_hidden)
        for done in _in_order(watched):
            results.append(_result(plan.prompts[done.index], done, stopping))
            if is_first:
                write(json.dumps(results[-1].to_dict(), ensure_ascii=False))
                if tell is not None:
                    tell(results[-1])
    if is_first and config.output is not None:
        log.info("wrote %d texts to %s", len(results), config.output)
    return results


@dataclass(frozen=True)
class _Plan:
    """What rank 0 has read and decided: how the checkpoint is decoded and split.

    Attributes:
        prompts: that are left to decode.
        num_done: prompts before them, which an earlier start has decoded.
    """

    prompts: list[Prompt]
    num_done: int
    source: CheckpointSource
    contract: DecodingContract
    layout: ParallelConfig


def _plan(config: GenerateConfig) -> _Plan:
    """Read the prompts and the checkpoint's sizes, and see whether the output can be written.

    Raises:
        ValueError: what is impossible about them.
    """
    if config.output is not None:
        check_new(Path(config.output))
    if config.temperature == 0.0 and (config.top_p < 1.0 or config.top_k > 0):
        log.warning("top_p and top_k have no effect at temperature 0; set a temperature to sample.")
    requests = read_requests(config)
    source = read_source(config)
    prompts, contract = encode_requests(requests, load_tokenizer(TokenizerFiles(source.tokenizer)), source)
    from megatron_dllm.parallel.device import DeviceFacts

    layout = config.layout(source.model, world_size(), DeviceFacts.here().is_cuda)
    num_done = _num_done(config, prompts)
    if num_done:
        log.info("%d of %d texts are there; %d are left", num_done, len(prompts), len(prompts) - num_done)
    return _Plan(prompts[num_done:], num_done, source, contract, layout)


def _num_done(config: GenerateConfig, prompts: Sequence[Prompt]) -> int:
    """How many prompts an interrupted start has decoded.

    Raises:
        ValueError: its lines are those of other prompts.
    """
    lines = partial_lines(Path(str(config.output))) if config.resume else []
    for number, line in enumerate(lines, start=1):
        place = f"{config.output}{PARTIAL}:{number}"
        value = parse_line(line, place)
        prompt = prompts[number - 1].text if number <= len(prompts) else None
        if prompt is None or not isinstance(value, dict) or value.get("prompt") != prompt:
            raise ValueError(f"{place} is not of prompt {number}; resume with the same prompts, or with resume=false.")
    return len(lines)


def _in_order(texts: Iterable[Finished]) -> Iterator[Finished]:
    """The texts by index, each held back until those before it have come."""
    held: dict[int, Finished] = {}
    due = 0
    for text in texts:
        held[text.index] = text
        while due in held:
            yield held.pop(due)
            due += 1


@contextmanager
def _written(config: GenerateConfig | None) -> Iterator[Callable[[str], None]]:
    """What writes a line to the output, if there is to be one, on the rank that has the configuration."""
    if config is None or config.output is None:
        yield lambda line: None
        return
    with result_lines(Path(config.output), config.resume) as write:
        yield write


def _result(prompt: Prompt, done: Finished, stopping: StopStrings) -> PromptResult:
    decode = stopping.tokenizer.decode
    token_texts = [decode([token], skip_special_tokens=False) for token in done.generation.generated_ids]
    return PromptResult(prompt.text, stopping.text_of(done.generation), done.generation, token_texts, done.seconds)


def show_text(result: PromptResult) -> None:
    """Print a prompt and its text to standard output."""
    out = Console(highlight=False, soft_wrap=True)
    out.print(Text(result.prompt, style="dim") + Text(result.text))
    out.file.flush()


def show_speed(results: Sequence[PromptResult]) -> None:
    """Print a table of forward passes to standard error."""
    table = Table("prompt", "tokens", "stop", "denoising forwards", "commits", "TPF", "tokens/s")
    for result in results:
        generation = result.generation
        num_tokens = len(generation.generated_ids)
        table.add_row(
            Text(result.prompt[:32]),
            str(num_tokens),
            generation.stop_reason,
            str(generation.num_denoising_forwards),
            str(generation.num_commit_forwards),
            f"{generation.tokens_per_forward:.2f}",
            f"{num_tokens / result.seconds:.1f}",
        )
    total_tokens = sum(len(result.generation.generated_ids) for result in results)
    total_forwards = sum(result.generation.num_denoising_forwards for result in results)
    console = Console(stderr=True)
    console.print(table)
    console.print(
        "TPF (generated tokens / denoising forwards, commits not counted): "
        f"{total_tokens} / {total_forwards} = {total_tokens / total_forwards:.2f}"
    )


def parse_arguments(arguments: Sequence[str]) -> GenerateConfig:
    """Compose generate.yaml, of the folder that --config-dir names or the shipped one, with `key=value` arguments.

    Texts and paths are taken as they are typed: Hydra's grammar would read commas, brackets and equal signs
    in a prompt, and takes `checkpoint=` for a choice among recipes/checkpoint.

    Raises:
        ValueError: an unknown key, or a value of a wrong type.
    """
    recipes, words = split_folder(arguments)
    texts, others = taken_as_typed(words, _AS_TYPED)
    for key, values in texts.items():
        if len(values) > 1:
            raise ValueError(f"{key} ({values[1][:80]}) is given twice; prompts_file takes several prompts.")
    # Open, not null: Hydra can put a group of values in the place of what has none, but not of null.
    ConfigStore.instance().store(name="generate_schema", node=GenerateConfig(rotary_scaling=MISSING))
    composed: Any = OmegaConf.to_container(compose_dict(others, "generate", recipes, GenerateConfig), resolve=True)
    composed["rotary_scaling"] = RotaryScalingConfig.of(composed["rotary_scaling"])
    return GenerateConfig(**(composed | {key: value for key, (value,) in texts.items()}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "-h" in arguments or "--help" in arguments:
        defaults = "\n".join(f"    {key.name}={key.default}" for key in keys_of(GenerateConfig))
        Console(highlight=False, soft_wrap=True).print(Text(f"{__doc__}\n{defaults}"))
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_dllm").setLevel(logging.INFO)
    results = generate(parse_arguments(arguments), show_text)
    if is_rank_zero() and results:
        show_speed(results)
    return 0


if __name__ == "__main__":
    run_command(main)
